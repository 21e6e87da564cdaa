"""Operators of group normalisation on channels-last tensors, with statistics in fp32.

torch's CUDA kernel reads and writes the other layout, and rounds its statistics to bf16. The
operators are known to torch.library, so torch.compile and fake tensors pass through them. On a GPU
they run the kernels of `models.layers.group_norm_kernels`, elsewhere the equations below.

Shapes in this file: B batch, C channels, G groups.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = "latent_foundry"
"""Namespace of the operators."""


class Affine(NamedTuple):
    """Numbers that a normalisation adds and multiplies; None: 0.

    y = norm(x + before) · weight + bias, then y · (1 + scale) + shift.
    """

    before: Tensor | None
    """[B, C]."""
    modulation: Tensor | None
    """[B, 2 · C], scales first."""
    weight: Tensor
    """[C]."""
    bias: Tensor
    """[C]."""

    def combined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is added before, the factor and the offset, as [B or 1, C, 1, 1]."""
        weight, bias = (part.to(dtype)[None, :, None, None] for part in (self.weight, self.bias))
        before = torch.zeros_like(bias)
        if self.before is not None:
            before = self.before.to(dtype)[:, :, None, None]
        if self.modulation is None:
            return before, weight, bias
        scale, shift = self.modulation.to(dtype)[:, :, None, None].chunk(2, dim=1)
        return before, weight * (1 + scale), bias * (1 + scale) + shift

    def gradients(self, grad_before: Tensor, sums: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the four tensors.

        grad_before: [B, C]; sums: [2, B, C], over the pixels: of the gradient of y, and of its
        product with the normalised x.
        """
        products, grads = sums[1], sums[0]
        if self.modulation is None:
            grad_modulation = None
        else:
            parts = products * self.weight + grads * self.bias, grads
            grad_modulation = torch.cat(parts, dim=1).to(self.modulation.dtype)
            more = 1 + self.modulation[:, : self.weight.numel()].to(sums.dtype)
            products, grads = products * more, grads * more
        return (
            None if self.before is None else grad_before.to(self.before.dtype),
            grad_modulation,
            products.sum(0).to(self.weight.dtype),
            grads.sum(0).to(self.bias.dtype),
        )


def can_normalise(x: Tensor) -> bool:
    """Whether `group_norm` is the best way for x [B, C, h, w].

    CPUs have a kernel of torch for both layouts.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_cpu and x.dtype is not torch.float64


@torch.library.custom_op(f"{NAMES}::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    before: Tensor | None,
    modulation: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x + before in each group (Wu and He 2018), scale and shift, then SiLU if `silu`.

    x: [B, C, h, w], channels-last; before, modulation, weight, bias: see `Affine`. Returns
    [B, C, h, w] like x, and the mean and reciprocal deviation of each group, [B, G] float32.
    """
    wide = _wide(x)
    added, factor, offset = Affine(before, modulation, weight, bias).combined(wide)
    values = _by_group(x.to(wide) + added, groups)
    variance, mean = torch.var_mean(values, 2, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    y = ((values - mean) * rstd).view(x.shape) * factor + offset
    y = F.silu(y) if silu else y
    return _like(y, x), mean.flatten(1), rstd.flatten(1)


@torch.library.custom_op(f"{NAMES}::group_norm_backward", mutates_args=())
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    modulation: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `group_norm`; grad: [B, C, h, w], channels-last.

    Returns the gradient of x, and the arguments of `Affine.gradients`.
    """
    wide, groups = _wide(x), mean.shape[1]
    added, factor, offset = Affine(before, modulation, weight, bias).combined(wide)
    centred = _by_group(x.to(wide) + added, groups) - mean[:, :, None]
    normed = (centred * rstd[:, :, None]).view(x.shape)
    own = grad.to(wide)
    if silu:
        own = torch.ops.aten.silu_backward(own, normed * factor + offset)
    sums = torch.stack([own.sum((2, 3)), (own * normed).sum((2, 3))])
    own, normed = _by_group(own * factor, groups), _by_group(normed, groups)
    own = own - own.mean(2, keepdim=True) - normed * (own * normed).mean(2, keepdim=True)
    grad_x = (own * rstd[:, :, None]).view(x.shape)
    return _like(grad_x, x), grad_x.sum((2, 3)), sums


def _group_norm_cuda(x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from models.layers import group_norm_launch  # a machine without a GPU may have no Triton

    *tensors, groups, eps, silu = inputs
    return group_norm_launch.normalise(x, Affine(*tensors), groups, eps, silu)


def _group_norm_backward_cuda(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    from models.layers import group_norm_launch

    *tensors, silu = inputs
    return group_norm_launch.differentiate(grad, x, mean, rstd, Affine(*tensors), silu)


group_norm.register_kernel("cuda")(_group_norm_cuda)
group_norm_backward.register_kernel("cuda")(_group_norm_backward_cuda)


@group_norm.register_fake
def _group_norm_shapes(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups: int = given[4]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean = x.new_empty((x.shape[0], groups), dtype=_wide(x))
    return y, mean, torch.empty_like(mean)


@group_norm_backward.register_fake
def _group_norm_backward_shapes(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, channels = x.shape[:2]
    grad_before = x.new_empty((batch, channels), dtype=_wide(x))
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, grad_before, x.new_empty((2, batch, channels), dtype=_wide(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors, mean, rstd = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x, *sums = group_norm_backward(grad, x, mean, rstd, *tensors, ctx.silu)
    return grad_x, *Affine(*tensors).gradients(*sums), None, None, None


group_norm.register_autograd(_differentiate, setup_context=_save)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, -1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).contiguous(memory_format=torch.channels_last)
