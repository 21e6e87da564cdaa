"""Labelled boxes as a condition (Rombach et al. 2022, section 4.3.1, appendix E.2.1)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.given import Given, LabelledBox
from models.conditioning.semantic_map import label_colours
from models.conditioning.token_transformer import TokenTransformer
from models.config import ConditionerConfig
from models.config.conditioning import LAYOUT_VOCABULARY, MAP_CLASSES

MOST_BOXES = 30
BOX_TOKENS = 3
"""The class, the corner at the left and top, and that at the right and bottom."""
LENGTH = MOST_BOXES * BOX_TOKENS + 2
"""[tokens] All boxes, then the two corners of the image."""
PADDING = LAYOUT_VOCABULARY - 1
"""In place of a box that is not there."""
GRID = 90
"""Positions along a side: the largest grid whose points the vocabulary can number."""
PICTURE_SIDE, FONT_SIZE, MARGIN = 256, 11, 3
"""[pixels] Of the picture of boxes that have no image beside them, and of its labels."""


def corner_number(x: float, y: float) -> int:
    """Return the number of the grid's point next to (x, y), parts of width and height in [0, 1]."""
    return round(y * (GRID - 1)) * GRID + round(x * (GRID - 1))


class Layout(Conditioner):
    """Tokens of boxes: the class and two corners of each, encoded by a transformer.

    Classes and corners share one vocabulary, as in the authors' code; their places tell them apart.
    The largest boxes come first, and those after MOST_BOXES are left out. The last two tokens are
    the corners of the image: the authors' are those of a crop of it, but here boxes are given in
    parts of the crop. The null condition has no boxes.
    """

    trainable = True

    def __init__(self, config: ConditionerConfig) -> None:
        """config: classes, width and layers."""
        super().__init__()
        self.context_dim = config.width
        self._numbers = {label: number for number, label in enumerate(config.classes)}
        self.transformer = TokenTransformer(LAYOUT_VOCABULARY, LENGTH, config.width, config.layers)

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Number the boxes: numbers [B, LENGTH], and a mask that is false for padding.

        Raises: ValueError where there are no boxes, or a label is not in conditioner.classes.
        """
        rows = [self._tokens(boxes) for boxes in self._boxes(given)]
        numbers = torch.tensor(rows)
        return {"numbers": numbers, "mask": numbers != PADDING}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Encode to tokens [B, LENGTH, width] and their mask."""
        mask = inputs["mask"]
        return Condition(self.transformer(inputs["numbers"], mask).float(), mask)

    @override
    def picture(self, given: Given, size: Size) -> Tensor:
        """Draw the boxes in the colours of their classes, with the labels that fit into them.

        H and W are those of the images; without images, PICTURE_SIDE.
        """
        sides = PICTURE_SIDE, PICTURE_SIDE
        if given.images is not None:
            sides = given.images.shape[2], given.images.shape[3]
        return torch.stack([self._drawn(boxes, sides) for boxes in self._boxes(given)])

    def _boxes(self, given: Given) -> Sequence[Sequence[LabelledBox]]:
        """Return the boxes of each sample; those of the null condition are left out."""
        if not given.boxes and any(caption is not None for caption in given.captions):
            raise ValueError(
                "conditioner.kind=layout needs boxes: sample.boxes, or in training data.boxes=true"
            )
        boxes = given.boxes or [()] * len(given.captions)
        pairs = zip(boxes, given.captions, strict=True)
        return [() if caption is None else own for own, caption in pairs]

    def _tokens(self, boxes: Sequence[LabelledBox]) -> list[int]:
        found = list[int]()
        for label, left, top, right, bottom in _largest_first(boxes)[:MOST_BOXES]:
            found += [self._class_number(label), corner_number(left, top)]
            found.append(corner_number(right, bottom))
        found += [PADDING] * (LENGTH - 2 - len(found))
        return [*found, corner_number(0, 0), corner_number(1, 1)]

    def _class_number(self, label: str) -> int:
        if label not in self._numbers:
            raise ValueError(f"label {label[:40]!r} of a box is not in conditioner.classes: add it")
        return self._numbers[label]

    def _drawn(self, boxes: Sequence[LabelledBox], size: Size) -> Tensor:
        """Draw boxes on white: [3, H, W] in [-1, 1]."""
        height, width = size
        image = Image.new("RGB", (width, height), "white")
        pencil, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
        for label, *corners in _largest_first(boxes):
            scaled = zip(corners, (width - 1, height - 1) * 2, strict=True)
            left, top, right, bottom = (round(part * side) for part, side in scaled)
            number = torch.tensor([[[self._class_number(label) % MAP_CLASSES]]])
            shades = ((label_colours(number).flatten() + 1) * 127.5).int()
            colour = f"rgb({shades[0]},{shades[1]},{shades[2]})"
            pencil.rectangle((left, top, right, bottom), outline=colour, width=2)
            text = " ".join(label.split())
            wide = pencil.textlength(text, font) + 2 * MARGIN <= right - left
            if wide and bottom - top >= FONT_SIZE + 2 * MARGIN:
                pencil.text((left + MARGIN, top + MARGIN), text, colour, font)
        return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1


def _largest_first(boxes: Sequence[LabelledBox]) -> Sequence[LabelledBox]:
    """Sort by area; boxes of one area stay in their order."""
    return sorted(boxes, key=lambda box: (box[1] - box[3]) * (box[4] - box[2]))
