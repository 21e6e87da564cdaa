"""Linear layers over rows, with few operations in the forward and in the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """x Wᵀ + b; torch's own layer spends half of its operations on views."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [rows, in] → [rows, out]."""
        return linear(input, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of pixels that are rows; the weight is [C_out, C_in, 1, 1].

    Its arguments are those of nn.Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: [rows, C_in] → [rows, C_out]."""
        return linear(input, self.weight.flatten(1), self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b. x: [rows, in]; weight: [out, in]; bias: [out] → [rows, out]."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        x_needs, weight_needs, bias_needs = ctx.needs_input_grad
        return (
            grad.mm(weight) if x_needs else None,
            grad.t().mm(x) if weight_needs else None,
            grad.sum(0) if bias_needs else None,
        )
