"""A CUDA graph can hold a denoiser's forward and backward pass.

The meta device computes shapes alone, so an operator that reads a value or chooses a shape by one
raises. What else a graph forbids is counted: tensors on the host, and shapes that change.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.condition import Condition
from models.latent_diffusion import LatentDiffusion
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.support.cudnn_layouts import flash_attention
from tests.support.unet_files import described_unet

META = torch.device("meta")


class Operators(TorchDispatchMode):
    """Lists operators with the shapes of their outputs, and those with a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, list[torch.Size]]] = []
        self.on_host: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tensors = [
            each for each in tree_leaves((args, kwargs, outputs)) if isinstance(each, Tensor)
        ]
        self.all.append((str(func), [tensor.shape for tensor in tensors]))
        if any(tensor.device != META for tensor in tensors):
            self.on_host.append(str(func))
        return outputs


def step(module: LatentDiffusion) -> Operators:
    config = module.unet.config
    latents = torch.empty(2, config.in_channels, 64, 64, device=META)
    tokens = torch.empty(2, 77, config.context_dim, device=META) if config.context_dim else None
    condition = Condition(tokens)
    latents = latents.contiguous(memory_format=torch.channels_last)
    timesteps = torch.empty(2, device=META)
    with Operators() as operators:
        module(latents, timesteps, condition).square().mean().backward()
    return operators


@pytest.mark.parametrize("name", ["sd2", "ldm8_churches"])
def test_a_pass_stays_on_the_device_and_repeats_its_operators(name: str) -> None:
    with META:
        unet = UNet2DCondition(described_unet(name)).to(torch.bfloat16)
    module = LatentDiffusion(unet, None)
    use_attention(module, flash_attention)
    step(module)  # the first one creates gradients, others add to them
    first, second = step(module), step(module)
    assert first.on_host == []
    assert len(first.all) > 1000
    assert first.all == second.all


def test_a_tensor_on_the_host_and_a_read_value_are_seen() -> None:
    with Operators() as operators:
        torch.zeros(3, device=META).mul_(torch.tensor(2.0))
    assert operators.on_host == ["aten.lift_fresh.default", "aten.mul_.Tensor"]
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(3, device=META).sum().item()
