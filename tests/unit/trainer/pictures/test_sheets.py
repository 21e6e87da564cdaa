"""Contact sheets and strips: their width, and how images are enlarged."""

import numpy as np
import pytest
from PIL import Image

from trainer.pictures.sheets import GAP, SIDE, contact_sheet, named_rows

CELL = SIDE + GAP


def checkers(side: int) -> Image.Image:
    """Pixels that are black and white in turns."""
    pixels = np.indices((side, side)).sum(axis=0) % 2 * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (8, 8), (9, 8)])
def test_a_sheet_is_as_wide_as_its_images(count: int, columns: int) -> None:
    sheet = contact_sheet([(checkers(SIDE), "a cat")] * count)
    assert sheet.width == columns * CELL + GAP


@pytest.mark.parametrize("side", [16, 32, 64, 100, SIDE])
def test_small_images_are_enlarged_by_a_whole_factor(side: int) -> None:
    factor = SIDE // side
    rows = named_rows([("a", [checkers(side)])])
    sheet = contact_sheet([(checkers(side), "a")])
    inset = (SIDE - side * factor) // 2
    for picture, left, bottom in ((sheet, GAP + inset, GAP + SIDE), (rows, GAP, rows.height - GAP)):
        box = (left, bottom - side * factor, left + side * factor, bottom)
        found = np.asarray(picture.crop(box).convert("L"))
        wanted = np.asarray(checkers(side).convert("L")).repeat(factor, 0).repeat(factor, 1)
        assert (found == wanted).all()


def test_large_images_are_made_smaller() -> None:
    sheet = contact_sheet([(Image.new("RGB", (1000, 500), "red"), "")])
    assert sheet.getpixel((GAP + SIDE // 2, GAP + SIDE - 5)) == (255, 0, 0)
    assert sheet.width == CELL + GAP
