"""Draw the holes that inpainting fills."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from models.conditioning.given import Draws

BOXES = 0.5
"""Share of holes that are boxes; others are brush strokes (Suvorov et al. 2022, section 2.3)."""
MOST_BOXES, MOST_STROKES, CORNERS = 3, 4, 4
BOX_SIDE = 0.15, 0.6
BRUSH = 0.06, 0.2
"""Side of a box, and width of a brush, in parts of the image's short side."""
UNIFORMS = 2 + MOST_STROKES * (1 + 2 * CORNERS)


def draw_holes(count: int, size: tuple[int, int], draws: Draws | None) -> Tensor:
    """Draw holes: [B, 1, H, W] float32, 1 inside.

    size: (H, W) in pixels. draws: None: the central square of half the short side.
    """
    if draws is None:
        hole = np.zeros((1, *size), np.float32)
        side = min(size) // 2
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        hole[:, top : top + side, left : left + side] = 1
        return torch.as_tensor(hole).expand(count, -1, -1, -1).clone()
    holes = [_hole(size, chances) for chances in draws.uniform(UNIFORMS)]
    return torch.as_tensor(np.stack(holes))[:, None].float()


def _hole(size: tuple[int, int], chances: NDArray[np.float64]) -> NDArray[np.uint8]:
    """chances: [UNIFORMS] from [0, 1)."""
    height, width = size
    image = Image.new("L", (width, height))
    pen = ImageDraw.Draw(image)
    rest = chances[2:].tolist()
    if chances[0] < BOXES:
        for number in range(1 + int(chances[1] * MOST_BOXES)):
            x, y, across, down = rest[4 * number : 4 * number + 4]
            w, h = (max(round(min(size) * _between(BOX_SIDE, one)), 1) for one in (across, down))
            left, top = math.floor((width - w + 1) * x), math.floor((height - h + 1) * y)
            pen.rectangle((left, top, left + w - 1, top + h - 1), fill=1)
        return np.asarray(image)
    each = 1 + 2 * CORNERS
    for number in range(1 + int(chances[1] * MOST_STROKES)):
        thickness, *places = rest[each * number : each * (number + 1)]
        brush = max(round(min(size) * _between(BRUSH, thickness)), 1)
        line = [(x * width, y * height) for x, y in zip(places[::2], places[1::2], strict=True)]
        pen.line(line, fill=1, width=brush)
        for x, y in line:  # round ends and corners
            pen.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    return np.asarray(image)


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
