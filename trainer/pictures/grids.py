"""Grids of images: where each image lies, and what the PNG of a grid says of its images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from data.shards.codecs import image_text
from data.storage.documents import is_json_array, is_json_object, parse_json
from data.text import printable

GAP = 2
"""Distance of the images in a grid, in pixels."""
MOST_IMAGES = 1024
"""Largest number of images of a grid that is taken apart by its own word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An image in a grid."""

    caption: str
    """One printable line."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge in pixels."""


def about_grid(prompts: Sequence[str], columns: int) -> dict[str, object]:
    """Return what a grid with an image for each prompt says of itself, as JSON values."""
    return {"prompts": list(prompts), "columns": columns}


def about_picture(content: bytes) -> dict[str, object]:
    """Return the JSON values in the content of a PNG; empty if it has none."""
    try:
        about: object = parse_json(image_text(content, "parameters"))
    except ValueError:
        return {}
    return about if is_json_object(about) else {}


def places(size: tuple[int, int], about: Mapping[str, object]) -> list[Place]:
    """Return the images of a grid row by row; empty if `about` does not fit the picture.

    size: width and height of the whole picture. about: see `about_grid`; it may be a stranger's.
    """
    prompts, columns = about.get("prompts"), about.get("columns")
    if not is_json_array(prompts) or type(columns) is not int:
        return []
    if not (0 < len(prompts) <= MOST_IMAGES and 0 < columns <= MOST_IMAGES):
        return []
    rows = -(-len(prompts) // columns)
    width, height = (size[0] - GAP) // columns - GAP, (size[1] - GAP) // rows - GAP
    if min(width, height) < 1:
        return []
    found: list[Place] = []
    for number, prompt in enumerate(prompts):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + GAP)
        box = (left, top, left + width, top + height)
        found.append(Place(caption=printable(str(prompt)), box=box))
    return found


def tiles(picture: Image.Image, height: int, width: int, columns: int) -> Iterator[Image.Image]:
    """Yield the images of a grid row by row; those at the end of the last row can be blank."""
    for top in range(GAP, picture.height - height, height + GAP):
        for left in range(GAP, columns * (width + GAP), width + GAP):
            yield picture.crop((left, top, left + width, top + height))
