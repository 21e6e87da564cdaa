"""Read captions and objects from annotations in the format of COCO.

Source: Lin et al. 2014, "Microsoft COCO", and the format page of cocodataset.org: `captions_*.json`
and `instances_*.json`, in the folder of the images or in its folder `annotations`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from data.shards.annotations import Box
from data.shards.codecs import MAX_PIXELS
from data.sources.caption_tables import Row
from data.storage.documents import is_json_array, is_json_object, parse_json

NAMES = ("captions_*.json", "instances_*.json")
FOLDER = "annotations"
MAX_BYTES = 2**30
"""Larger than the instances of COCO 2017, 470 MB."""
OBJECTS = "objects"
"""Field of an image: its objects, `{category, bbox}`; bbox: [left, top, width, height], pixels."""


def is_annotation(name: str) -> bool:
    """Say whether a file of a folder of images, by its relative path, has annotations of COCO."""
    path = PurePosixPath(name)
    known = any(path.match(pattern) for pattern in NAMES)
    return known and path.parent.as_posix() in (".", FOLDER)


class Notes(NamedTuple):
    """What the annotations of a folder say."""

    rows: dict[str, Row]
    """Path of an image → its captions and objects."""
    others: list[str]
    """Files that describe none of the images, such as those of another split."""
    labels: list[str]
    """Names of the categories."""


def read_annotations(
    read: Callable[[str, int], bytes], place: str, files: Iterable[str], images: Iterable[str]
) -> Notes:
    """Read annotations.

    read: reads a file up to one byte over a limit. place: folder of the files, for errors.
    files: relative paths. images: relative paths of the images, which may lie in any folder.
    Raises: ValueError where a file is damaged, or two images have a name that it describes.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for image in images:
        places[PurePosixPath(image).name].append(image)
    rows: dict[str, Row] = {}
    others: list[str] = []
    labels: dict[str, None] = {}
    for file in files:
        try:
            document = parse_json(read(file, MAX_BYTES), limit=MAX_BYTES)
            found = _rows_of(document, places)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}/{file}: no annotations of COCO ({error})") from error
        if found is None:
            others.append(file)
            continue
        for image, row in found.items():
            mine = rows.setdefault(image, Row())
            mine.captions += row.captions
            mine.fields |= row.fields
            if row.boxes is not None:
                mine.boxes = [*(mine.boxes or []), *row.boxes]
        labels |= dict.fromkeys(_categories(document).values())
    return Notes(rows, others, list(labels))


def _categories(document: dict[str, Any]) -> dict[Any, str]:
    return {one["id"]: str(one["name"]) for one in document.get("categories", [])}


def _rows_of(document: Any, places: Mapping[str, list[str]]) -> dict[str, Row] | None:
    """Return the rows of a document; None if it describes none of the images."""
    if not is_json_object(document) or not is_json_array(document.get("annotations")):
        raise ValueError("it has no list of annotations")
    names: dict[Any, str] = {}
    for entry in document["images"]:
        name = PurePosixPath(str(entry["file_name"])).name
        if len(places.get(name, [])) > 1:
            raise ValueError(f"{' and '.join(places[name][:2])} have one name")
        names[entry["id"]] = name
    if places.keys().isdisjoint(names.values()):
        return None
    categories = _categories(document)
    rows = {
        places.get(name, [name])[0]: Row(boxes=[] if categories else None)
        for name in names.values()
    }
    for note in document["annotations"]:
        name = names[note["image_id"]]
        row = rows[places.get(name, [name])[0]]
        if "caption" in note:
            row.add(note["caption"], {})
        elif "category_id" in note:
            label, bbox = categories.get(note["category_id"]), note.get("bbox")
            if label is not None:
                row.fields.setdefault(OBJECTS, []).append({"category": label, "bbox": bbox})
            if row.boxes is not None:
                row.boxes.append(_box(label or f"category {note['category_id']}", bbox))
    return rows


def _box(label: str, bbox: Any) -> Box:
    """Return a box in pixels; NaN where there is none, which no check lets pass."""
    numbers = bbox if is_json_array(bbox) else []
    numbers = [n for n in numbers if type(n) in (int, float) and abs(n) < MAX_PIXELS]
    if len(numbers) != 4:
        return Box(label, *[math.nan] * 4)
    left, top, width, height = numbers
    return Box(label, left, top, left + width, top + height)
