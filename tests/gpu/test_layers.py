"""Layers in low precision against torch's in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.activations import _GEGLULinear
from models.layers.group_norm import _GroupNormSiLU
from models.layers.group_norm_ops import group_norm
from models.layers.linear import linear
from tests.support.errors import relative_errors

pytestmark = pytest.mark.gpu

GROUPS, EPS = 32, 1e-5
LARGEST_ERRORS = {torch.float32: 4e-6, torch.bfloat16: 2**-7}
MEANS = [0.0, 8.0]
"""Of the inputs, in standard deviations."""


def norm_silu(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + shift[:, :, None, None], GROUPS, weight, bias, EPS))


def norm_inputs(mean: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(2, 320, 33, 33), (2, 320), (320,), (320,)]
    x, *others = (torch.randn(size, device=device) for size in sizes)
    return [each.to(dtype) for each in (x + mean, *others)]


@pytest.mark.parametrize("mean", [*MEANS, 16.0])
@pytest.mark.parametrize("dtype", LARGEST_ERRORS, ids=str)
def test_group_norm_in_channels_last(dtype: torch.dtype, mean: float, device: torch.device) -> None:
    x, *others = norm_inputs(mean, dtype, device)
    x = x.contiguous(memory_format=torch.channels_last)
    errors = relative_errors(
        lambda x, shift, *affine: group_norm(x, shift, None, *affine, GROUPS, EPS, True)[0],
        norm_silu,
        [x, *others],
    )
    assert max(errors) < LARGEST_ERRORS[dtype]


@pytest.mark.parametrize("mean", MEANS)
def test_group_norm_in_torchs_layout(mean: float, device: torch.device) -> None:
    """torch's kernel keeps its statistics in bf16."""
    errors = relative_errors(
        lambda *inputs: _GroupNormSiLU.apply(*inputs, GROUPS, EPS),
        norm_silu,
        norm_inputs(mean, torch.bfloat16, device),
    )
    assert max(errors) < 4 * LARGEST_ERRORS[torch.bfloat16]


@pytest.mark.parametrize("mean", MEANS)
def test_geglu(mean: float, device: torch.device) -> None:
    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=1)
        return F.linear(values * F.gelu(gates), weight, bias)

    inputs = matrices((512, 640), (160, 320), mean, device)
    errors = relative_errors(_GEGLULinear.apply, exact, inputs)
    assert max(errors) < 2 * LARGEST_ERRORS[torch.bfloat16]


@pytest.mark.parametrize("mean", MEANS)
def test_linear(mean: float, device: torch.device) -> None:
    inputs = matrices((512, 320), (160, 320), mean, device)
    errors = relative_errors(linear, F.linear, inputs)
    assert max(errors) < LARGEST_ERRORS[torch.bfloat16]


def matrices(
    rows: tuple[int, int], weight: tuple[int, int], mean: float, device: torch.device
) -> list[Tensor]:
    """x, weight and bias in bf16."""
    torch.manual_seed(0)
    x, *others = (torch.randn(size, device=device) for size in (rows, weight, weight[:1]))
    return [each.to(torch.bfloat16) for each in (x + mean, *others)]
