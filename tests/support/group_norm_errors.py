"""Errors of the Triton kernels of group normalisation, run by Triton's interpreter on a CPU.

`python -m tests.support.group_norm_errors`, with a JSON list of cases on the standard input; prints
a JSON list of errors: for each tensor that a kernel computes, ‖found − expected‖ ÷ ‖expected‖ from
float64.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import group_norm_launch
from models.layers.group_norm_ops import Affine

EPS = 1e-5


def errors(
    channels: int,
    groups: int,
    side: int,
    mean: float,
    *,
    dtype: str = "float32",
    batch: int = 1,
    before: bool = False,
    modulated: bool = False,
    silu: bool = True,
) -> dict[str, float]:
    """One case; mean: of x, in standard deviations."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(getattr(torch, dtype))

    x = (torch.randn(batch, channels, side, side) + mean).to(getattr(torch, dtype))
    x = x.contiguous(memory_format=torch.channels_last)
    affine = Affine(
        random(batch, channels) if before else None,
        random(batch, 2 * channels) if modulated else None,
        random(channels),
        random(channels),
    )
    grad = torch.randn_like(x)
    y, means, rstds = group_norm_launch.normalise(x, affine, groups, EPS, silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad_x, *sums = group_norm_launch.differentiate(grad, x, means, rstds, affine, silu)
    found = (y, grad_x, *affine.gradients(*sums))
    wide = [each if each is None else each.double().requires_grad_() for each in (x, *affine)]
    leaves = [each for each in wide if each is not None]
    expected = expected_output(wide, groups, silu)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    computed = [each for each in found if each is not None]
    named = zip(("y", "x", *Affine._fields), found, strict=True)
    names = [name for name, each in named if each is not None]
    assert len(computed) == 1 + len(gradients)
    pairs = zip(names, computed, (expected, *gradients), strict=True)
    return {name: distance(mine, theirs) for name, mine, theirs in pairs}


def expected_output(inputs: list[Tensor | None], groups: int, silu: bool) -> Tensor:
    """By torch's layers; inputs: x, and the fields of Affine."""
    x, before, modulation, weight, bias = inputs
    assert x is not None
    if before is not None:
        x = x + before[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, EPS)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def distance(found: Any, expected: Tensor) -> float:
    return float((found.double() - expected.detach()).norm() / expected.detach().norm())


if __name__ == "__main__":
    print(json.dumps([errors(**case) for case in json.load(sys.stdin)]))
