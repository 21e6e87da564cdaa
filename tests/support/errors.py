"""Errors of a function in low precision, against another one in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def relative_errors(
    ours: Function, exact: Function, inputs: Sequence[Tensor], probe: Tensor | None = None
) -> list[float]:
    """‖found − expected‖ ÷ ‖expected‖ of the output, and of the gradient of each input.

    probe: the gradient of the output; None: random.
    """
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    found = ours(*leaves)
    probe = torch.randn_like(found) if probe is None else probe
    mine = [found, *torch.autograd.grad(found, leaves, probe)]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    expected = exact(*wide)
    theirs = [expected, *torch.autograd.grad(expected, wide, probe.double())]
    return [
        float((one.double() - other).detach().norm() / other.detach().norm())
        for one, other in zip(mine, theirs, strict=True)
    ]
