"""Contact sheets: images with captions, and rows of images with names."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.text import escaped, printable

MOST_COLUMNS = 8
SIDE = 144
"""Side of a thumbnail, in pixels."""
GAP = 8
FONT_SIZE = 11
CAPTION_LINES = 3
LINE_HEIGHT = 14
BACKGROUND = "#eeeeee"
"""Grey, because images can have white edges."""


def contact_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Lay out images with their captions, row by row.

    Small images are enlarged by a whole factor to fit SIDE, large ones made smaller.
    """
    font = _font()
    cell = (SIDE + GAP, SIDE + GAP + CAPTION_LINES * LINE_HEIGHT)
    columns = min(len(pictures), MOST_COLUMNS)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), BACKGROUND)
    pencil = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        left, top = (number % columns) * cell[0] + GAP, (number // columns) * cell[1] + GAP
        thumbnail = _fitted(picture)
        inset = (SIDE - thumbnail.width) // 2, SIDE - thumbnail.height
        sheet.paste(thumbnail, (left + inset[0], top + inset[1]))
        for line, text in enumerate(_wrapped(caption, font)):
            place = (left, top + SIDE + 2 + line * LINE_HEIGHT)
            pencil.text(place, text, "black", font)
    return sheet


def named_rows(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Lay out rows of images, each under its name; all images have the same size.

    Small images are enlarged by a whole factor to fit SIDE.
    """
    font = _font()
    rows = [(printable(name), [_enlarged(one) for one in pictures]) for name, pictures in rows]
    width, height = rows[0][1][0].size
    most = max(len(pictures) for _, pictures in rows)
    step = LINE_HEIGHT + 2 + height + GAP
    size = max(most * (width + GAP), *(int(font.getlength(name)) for name, _ in rows)) + GAP
    sheet = Image.new("RGB", (size, len(rows) * step + GAP), BACKGROUND)
    pencil = ImageDraw.Draw(sheet)
    for number, (name, pictures) in enumerate(rows):
        top = GAP + number * step
        pencil.text((GAP, top), name, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + column * (width + GAP), top + LINE_HEIGHT + 2))
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    if max(picture.size) > SIDE:
        return ImageOps.contain(picture, (SIDE, SIDE))
    return _enlarged(picture)


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, SIDE // max(picture.size))
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own fonts have Western European letters only
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), FONT_SIZE)


def _wrapped(caption: str, font: ImageFont.FreeTypeFont) -> Iterator[str]:
    """Break a caption into CAPTION_LINES of width SIDE; the last one can end in an ellipsis."""
    words = escaped(" ".join(caption[:1000].split()))
    for line in range(CAPTION_LINES):
        if not words:
            return
        fitting = _fitting(words, font)
        if fitting == len(words):
            yield words
            return
        if line == CAPTION_LINES - 1:
            yield words[: fitting - 1].rstrip() + "…"
            return
        space = words.rfind(" ", 0, fitting + 1)
        cut = space if space > 0 else fitting
        yield words[:cut]
        words = words[cut:].lstrip()


def _fitting(words: str, font: ImageFont.FreeTypeFont) -> int:
    """Return the number of characters that fit into SIDE pixels, at least two."""
    for count in range(2, len(words) + 1):
        if font.getlength(words[:count]) > SIDE:
            return max(2, count - 1)
    return len(words)
