"""Layers that store only their inputs for the backward pass, and compute the rest again there.

Each keeps an intermediate as large as its output from being stored: together about a fifth of a
U-Net's activations, for about a hundredth of its time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation (Wu and He 2018), then x · sigmoid(x): [B, C, h, w] → [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return _GroupNormSiLU.apply(input, self.weight, self.bias, self.num_groups, self.eps)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.groups, ctx.eps = groups, eps
        stored = x.contiguous(memory_format=_norm_format(x))
        normed, mean, rstd = torch.native_group_norm(stored, weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        x = x.contiguous(memory_format=_norm_format(x))
        normed, _, _ = torch.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)
        grad = torch.ops.aten.silu_backward(grads[0], normed)
        grad = grad.contiguous(memory_format=_norm_format(x))
        needed = ctx.needs_input_grad[:3]
        return (
            *torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, *_sizes(x), ctx.groups, needed
            ),
            None,
            None,
        )


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _norm_format(x: Tensor) -> torch.memory_format:
    """The layout that the device's normalisation reads; only the CPU's reads channels-last."""
    channels_last = x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def geglu(values_and_gates: Tensor) -> Tensor:
    """Values times the GELU of their gates: [..., 2 · width] → [..., width].

    Shazeer 2020, equation 6.
    """
    return _GEGLU.apply(values_and_gates)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        values, gates = x.chunk(2, dim=-1)
        return F.gelu(gates).mul_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, gates = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad_values = grads[0] * F.gelu(gates)
        grad_gates = torch.ops.aten.gelu_backward(grads[0] * values, gates)
        return torch.cat([grad_values, grad_gates], dim=-1)
