"""torch.compile by block: a U-Net repeats a few, and compiling each once is much less than all."""

from torch import nn

from models.blocks import ResBlock, SpatialAttention
from models.transformer import SpatialTransformer

BLOCKS = (ResBlock, SpatialTransformer, SpatialAttention)
SHAPES = 64
"""Blocks of one class that may differ in shape; torch gives up at 8 of its own accord."""


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks of a network in place, at their first call; names of weights stay.

    Blocks of one class and shape share their code. Shapes are taken as fixed: those of a training
    are, and kernels for any shape are slower.
    """
    for child in module.children():
        if isinstance(child, BLOCKS):
            child.compile(dynamic=False, recompile_limit=SHAPES)
        else:
            compile_blocks(child)
