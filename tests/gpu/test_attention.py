"""Kernels of attention against the equation in float64, forward and backward."""

import pytest
import torch

from models.config import AttentionBackend
from models.layers.attention import (
    AttentionShape,
    Backend,
    choose_attention,
    reference_attention,
    sdpa_attention,
    why_not_xformers,
    xformers_attention,
)
from tests.support.errors import relative_errors

pytestmark = pytest.mark.gpu

LARGEST_ERRORS = {torch.bfloat16: 2**-6, torch.float32: 1e-4}
TOO_NEW = (10, 0)
"""From this capability on, xformers lacks kernels; the training then takes SDPA."""


@pytest.mark.parametrize("dtype", LARGEST_ERRORS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 160, 512])
@pytest.mark.parametrize("backend", [sdpa_attention, xformers_attention])
def test_kernels_agree_with_the_equation(
    backend: Backend, head_dim: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    shape = AttentionShape(2, 256, 77, 4, head_dim, masked)
    if backend is xformers_attention:
        refused = why_not_xformers(device, dtype, [shape])
        if torch.cuda.get_device_capability(device) < TOO_NEW:
            assert not refused
        elif refused:
            pytest.skip(next(iter(refused.values())))
    torch.manual_seed(0)
    sizes = [(2, tokens, 4, head_dim) for tokens in (256, 77, 77)]
    inputs = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    mask = torch.rand(2, 77, device=device) < 0.5 if masked else None
    if mask is not None:
        mask[:, 0] = True
    errors = relative_errors(
        lambda q, k, v: backend(q, k, v, mask),
        lambda q, k, v: reference_attention(q, k, v, mask),
        inputs,
    )
    assert max(errors) < LARGEST_ERRORS[dtype]


def test_the_choice_trains(device: torch.device) -> None:
    shapes = [AttentionShape(2, 16, 5, 2, 8, masked=True), AttentionShape(2, 16, 16, 2, 8)]
    choice = choose_attention(AttentionBackend.auto, device, torch.bfloat16, shapes)
    assert choice.line.startswith("attention: ")
    q = torch.randn(2, 16, 2, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    choice.backend(q, q, q, None).sum().backward()
    assert q.grad is not None
