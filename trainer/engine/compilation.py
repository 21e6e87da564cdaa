"""torch.compile by block: a network repeats a few kinds of blocks; each is compiled once."""

from typing import Any

from torch import nn

from models.layers.blocks import ResBlock, SpatialAttention
from models.layers.transformer import SpatialTransformer

BLOCKS = (ResBlock, SpatialTransformer, SpatialAttention)
SHAPES = 64
"""Largest number of shapes for blocks of one class; torch's default of 8 is too few."""


def compile_blocks(module: nn.Module) -> None:
    """Let torch compile the blocks of a network at their first call; parameter names do not change.

    Blocks of one class and shape share compiled code. Shapes are constants of the code: they do not
    change in a training, and kernels for dynamic shapes are slower.
    """
    for child in module.children():
        if isinstance(child, BLOCKS):
            block: Any = child  # torch declares no types for `compile`
            block.compile(dynamic=False, recompile_limit=SHAPES)
        else:
            compile_blocks(child)
