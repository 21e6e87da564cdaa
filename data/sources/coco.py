"""Read captions and objects from annotations in the format of COCO.

Source: Lin et al. 2014, "Microsoft COCO", and the format page of cocodataset.org: `captions_*.json`
and `instances_*.json`, in the folder of the images or in its folder `annotations`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

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


def read_annotations(
    read: Callable[[str, int], bytes], place: str, files: Iterable[str], images: Iterable[str]
) -> tuple[dict[str, Row], list[str]]:
    """Read annotations: ({path of an image: its captions and objects}, files of other images).

    read: reads a file up to one byte over a limit. place: folder of the files, for errors.
    files: relative paths. images: relative paths of the images, which may lie in any folder.
    A file that describes none of the images, such as that of another split, is not used.
    Raises: ValueError where a file is damaged, or two images have a name that it describes.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for image in images:
        places[PurePosixPath(image).name].append(image)
    rows: dict[str, Row] = {}
    others: list[str] = []
    for file in files:
        try:
            found = _rows_of(parse_json(read(file, MAX_BYTES), limit=MAX_BYTES), places)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}/{file}: no annotations of COCO ({error})") from error
        if found is None:
            others.append(file)
            continue
        for image, row in found.items():
            mine = rows.setdefault(image, Row())
            mine.captions += row.captions
            mine.fields |= row.fields
    return rows, others


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
    categories = {one["id"]: str(one["name"]) for one in document.get("categories", [])}
    rows = {places.get(name, [name])[0]: Row() for name in names.values()}
    for note in document["annotations"]:
        name = names[note["image_id"]]
        row = rows[places.get(name, [name])[0]]
        if "caption" in note:
            row.add(note["caption"], {})
        elif note.get("category_id") in categories:
            thing = {"category": categories[note["category_id"]], "bbox": note.get("bbox")}
            row.fields.setdefault(OBJECTS, []).append(thing)
    return rows
