"""Launches the Triton kernels of group normalisation (`models.layers.group_norm_kernels`)."""

from typing import Any

import torch
import triton
from torch import Tensor

from models.layers import group_norm_kernels
from models.layers.group_norm_ops import Affine

kernels: Any = group_norm_kernels  # Triton's types are those of the code within a kernel


class Sizes:
    """Grids of the kernels, and their arguments that are numbers."""

    def __init__(self, x: Tensor, groups: int) -> None:
        """x: [B, C, h, w], channels-last."""
        batch, self.channels, height, width = x.shape
        self.pixels = height * width
        self.chunks = triton.cdiv(self.pixels, kernels.CHUNK_PIXELS.value)
        self.width = self.channels // groups
        blocks = triton.cdiv(self.channels, kernels.BLOCK_CHANNELS.value)
        self.pixel_grid = (self.chunks, blocks, batch)
        self.group_grid = (batch, groups)


def normalise(
    x: Tensor, affine: Affine, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `models.layers.group_norm_ops.group_norm`."""
    sizes = Sizes(x, groups)
    partial = x.new_empty((len(x), sizes.chunks, 2, sizes.channels), dtype=torch.float32)
    mean, rstd = (x.new_empty((len(x), groups), dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    given, flags = _arguments(affine)
    numbers = sizes.pixels, sizes.channels
    kernels.channel_moments[sizes.pixel_grid](x, partial, *numbers)
    padded = triton.next_power_of_2(sizes.width)
    kernels.group_moments[sizes.group_grid](
        partial, given[0], mean, rstd, *numbers, sizes.chunks, eps, flags[0], sizes.width, padded
    )
    kernels.output[sizes.pixel_grid](x, y, mean, rstd, *given, *numbers, *flags, silu, sizes.width)
    return y, mean, rstd


def differentiate(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `models.layers.group_norm_ops.group_norm_backward`."""
    groups = mean.shape[1]
    sizes = Sizes(x, groups)
    partial = mean.new_empty((len(x), sizes.chunks, 3, sizes.channels))
    sums = mean.new_empty((2, len(x), sizes.channels))
    grad_before, means = torch.empty_like(sums[0]), mean.new_empty((2, len(x), groups))
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    given, flags = _arguments(affine)
    numbers = sizes.pixels, sizes.channels
    shared = mean, rstd, *given, *numbers, *flags, silu, sizes.width
    kernels.channel_sums[sizes.pixel_grid](grad, x, partial, *shared)
    padded = triton.next_power_of_2(sizes.width)
    kernels.group_sums[sizes.group_grid](
        partial, sums, means, grad_before, *given[1:3], rstd, *numbers, sizes.chunks, flags[1],
        sizes.width, padded,
    )  # fmt: skip
    kernels.input_gradient[sizes.pixel_grid](grad, x, grad_x, means, *shared)
    return grad_x, grad_before, sums


def _arguments(affine: Affine) -> tuple[tuple[Any, ...], tuple[bool, bool]]:
    """Return the tensors of kernels, and whether the first two are there; others are not read."""
    given = tuple(affine.weight if part is None else part.contiguous() for part in affine)
    return given, (affine.before is not None, affine.modulation is not None)
