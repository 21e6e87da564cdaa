"""What samples give for their condition: captions, and what a kind of conditioner reads beside."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Captions = Sequence[str | None]
"""The caption of each sample; None: no condition."""
LabelledBox = tuple[str, float, float, float, float]
"""Label, left, top, right and bottom, in parts of the width and of the height of the image."""


class Draws(Protocol):
    """The random choices for B visits to samples."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw from [0, 1): [B, count]. A second call draws the same numbers again."""
        ...

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw standard normal values: [B, *shape]. A second call draws the same again."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """What B samples give for their condition. A conditioner reads the parts of its kind."""

    captions: Captions
    images: Tensor | None = None
    """[B, 3, H, W] float32 in [-1, 1], the images that the condition is made of."""
    maps: Tensor | None = None
    """[B, H, W] uint8, the class number of each pixel."""
    boxes: Sequence[Sequence[LabelledBox]] = ()
    """[B], the labelled boxes of each sample."""
    small: Tensor | None = None
    """[B, 3, h, w] float32 in [-1, 1], the pictures that super-resolution enlarges; None: made of
    `images`."""
    masks: Tensor | None = None
    """[B, 1, H, W] float32, 1 in the hole that inpainting fills and 0 elsewhere; None: drawn."""
    draws: Draws | None = None
    """For conditions that are random; None: such a condition takes its plainest form."""

    @property
    def known(self) -> Tensor:
        """[B] bool, false for samples with the null condition."""
        return torch.tensor([caption is not None for caption in self.captions])

    def with_captions(self, captions: Captions) -> "Given":
        """Return the same with other captions, such as None for the null condition."""
        return replace(self, captions=captions)
