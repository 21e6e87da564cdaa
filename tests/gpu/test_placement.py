"""Networks that are lent to a GPU."""

import pytest
import torch
from torch import nn

from trainer.runtime.placement import on_device

pytestmark = pytest.mark.gpu


def test_weights_lie_on_the_gpu_only_while_they_are_lent(device: torch.device) -> None:
    module, resident = nn.Linear(2, 2), nn.Linear(2, 2).to(device)
    before = module.weight.detach().clone()
    with torch.inference_mode(), on_device([module, resident], device):
        assert module.weight.device == device
    assert module.weight.device == torch.device("cpu")
    assert resident.weight.device == device
    assert torch.equal(module.weight, before)
    module(torch.ones(1, 2)).sum().backward()
