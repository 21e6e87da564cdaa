"""Group normalisation (Wu and He 2018), alone or with SiLU, x · sigmoid(x).

Channels-last tensors on a GPU are normalised by `models.layers.group_norm_ops`, others by torch's
kernel. The layers store only their inputs, and recompute the rest in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.group_norm_ops import can_normalise, group_norm


class GroupNorm(nn.GroupNorm):
    """Group normalisation that keeps the memory layout of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, C, h, w] → [B, C, h, w]."""
        if can_normalise(input):
            given = input, None, None, self.weight, self.bias
            return group_norm(*given, self.num_groups, self.eps, silu=False)[0]
        return super().forward(input)


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation, then SiLU."""

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """input: [B, C, h, w]; shift: [B, C], added to every pixel first → [B, C, h, w]."""
        if can_normalise(input):
            given = input, shift, None, self.weight, self.bias
            return group_norm(*given, self.num_groups, self.eps, silu=True)[0]
        return _GroupNormSiLU.apply(input, shift, self.weight, self.bias, self.num_groups, self.eps)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        if shift is not None:
            x = x + _per_pixel(shift)
        normed, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normed, _, _ = _normalise(x, weight, bias, ctx.groups, ctx.eps)
        grad = torch.ops.aten.silu_backward(grads[0], normed)
        x_needs, shift_needs, weight_needs, bias_needs = ctx.needs_input_grad[:4]
        grad_x, grad_weight, grad_bias = _normalise_backward(
            grad,
            x,
            mean,
            rstd,
            weight,
            ctx.groups,
            (x_needs or shift_needs, weight_needs, bias_needs),
        )
        grad_shift = grad_x.sum((2, 3)) if shift_needs and grad_x is not None else None
        return grad_x, grad_shift, grad_weight, grad_bias, None, None


class GroupNormModulateSiLU(nn.Module):
    """SiLU(norm(x) · (1 + scale) + shift), for group normalisation and a scale for each sample.

    Nichol and Dhariwal 2021, appendix A.
    """

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale_and_shift: Tensor) -> Tensor:
        """x: [B, C, h, w]; scale_and_shift: [B, 2 · C], scales first → [B, C, h, w]."""
        if can_normalise(x):
            given = x, None, scale_and_shift, self.weight, self.bias
            return group_norm(*given, self.groups, self.eps, silu=True)[0]
        return _GroupNormModulateSiLU.apply(
            x, scale_and_shift, self.weight, self.bias, self.groups, self.eps
        )


class _GroupNormModulateSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale_and_shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        normed, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, scale_and_shift, weight, bias, mean, rstd)
        scale, shift = (_per_pixel(part) for part in scale_and_shift.chunk(2, dim=1))
        return F.silu(torch.addcmul(shift, normed, scale + 1.0), inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_and_shift, weight, bias, mean, rstd = ctx.saved_tensors
        normed, _, _ = _normalise(x, weight, bias, ctx.groups, ctx.eps)
        scale, shift = (_per_pixel(part) for part in scale_and_shift.chunk(2, dim=1))
        factor = scale + 1.0
        grad = torch.ops.aten.silu_backward(grads[0], torch.addcmul(shift, normed, factor))
        grad_scale_and_shift = torch.cat([(grad * normed).sum((2, 3)), grad.sum((2, 3))], dim=1)
        x_needs, _, *affine_needs = ctx.needs_input_grad[:4]
        grad_x, grad_weight, grad_bias = _normalise_backward(
            grad * factor, x, mean, rstd, weight, ctx.groups, (x_needs, *affine_needs)
        )
        return grad_x, grad_scale_and_shift, grad_weight, grad_bias, None, None


def _per_pixel(values: Tensor) -> Tensor:
    return values.view(*values.shape, 1, 1)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the group norm, and the mean and reciprocal deviation [B, groups] of each group."""
    x = x.contiguous(memory_format=_norm_format(x))
    return torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)


def _normalise_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    groups: int,
    needed: tuple[bool, ...],
) -> Sequence[Tensor | None]:
    """Return the gradients of x, weight and bias, or None where not `needed`."""
    layout = _norm_format(x)
    grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    # the CPU's kernel for channels-last tensors is faster in fp32
    widen = layout is torch.channels_last and x.dtype is torch.bfloat16
    if widen:
        grad, x, mean, rstd, weight = (each.float() for each in (grad, x, mean, rstd, weight))
    grads: Any = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, weight, *_sizes(x), groups, needed
    )
    return [each if each is None else each.bfloat16() for each in grads] if widen else grads


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _norm_format(x: Tensor) -> torch.memory_format:
    """Choose the memory layout for normalisation: only the CPU's kernel reads channels-last."""
    channels_last = x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
