"""Make raw samples from captions, fields, classes and images, the same for every source."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data.config import CaptionForm, DataConfig
from data.shards.captions import JSON_FIELD
from data.shards.codecs import MAX_TEXT_BYTES, BadSampleError, check_unicode, decode_image
from data.shards.formats import extension_of
from data.shards.index import crc32
from data.shards.splits import draws
from data.sources.caption_tables import Row
from data.sources.samples import RawSample
from data.storage.documents import MAX_JSON_BYTES
from data.text import printable, words_of

SEVERAL_CAPTIONS = "several captions: data.captions=json draws one at every visit"
MAX_FIELDS_BYTES = MAX_JSON_BYTES - 2**16
"""Largest JSON of a sample's fields; packing adds its size, hash and name."""


class Classes:
    """The classes of a source, by number.

    names: of the classes, in any order; without any, labels are numbers. Names that are numbers
    are sorted as numbers, so that those from 0 on are their own numbers.
    """

    def __init__(self, names: Iterable[str], *, ordered: bool = False) -> None:
        """ordered: whether the order of the names is that of their numbers."""
        found = list(names) if ordered else sorted(set(names))
        if not ordered and all(name.isdecimal() for name in found):
            found.sort(key=int)
        self.names: Sequence[str] = found
        self._numbers = {name: number for number, name in enumerate(found)}

    def number_of(self, label: object) -> int | None:
        """Return the number of a class, given by name or number; None for no class.

        Raises: BadSampleError where the label is neither.
        """
        if label is None or label == "":
            return None
        number: object = self._numbers.get(str(label), label)
        if isinstance(number, str) and number.isdecimal():
            number = int(number)  # a CSV has texts alone
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise BadSampleError(f"class is {printable(str(label))}, neither a name nor a number")
        if self.names and number >= len(self.names):
            raise BadSampleError(f"class {number} is over the last one, {len(self.names) - 1}")
        return number


def make_sample(
    name: str,
    row: Row,
    label: int | None,
    classes: Classes,
    read: Callable[[], bytes],
    config: DataConfig,
    extension: str = "",
) -> RawSample:
    """Make a sample; its image is read last.

    row: captions and fields. label: number of its class. read: reads the encoded image.
    extension: of the image; empty: by its content.
    Raises: BadSampleError where a caption is required and missing, text or image cannot be used;
    OSError of `read`.
    """
    captions, fields, noted = row.captions, row.fields, Counter(row.noted)
    if row.problem:
        raise BadSampleError(row.problem)
    if not captions and label is not None and classes.names:
        captions = [words_of(classes.names[label])]
    fields = _with_captions(captions, fields, noted, config)
    check_unicode([captions, fields])
    if captions and (size := len(captions[0].encode())) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {size} bytes is over {MAX_TEXT_BYTES}")
    if (size := len(json.dumps(fields, ensure_ascii=False).encode())) > MAX_FIELDS_BYTES:
        raise BadSampleError(f"fields of {size} bytes are over {MAX_FIELDS_BYTES}")
    if not captions and label is None and config.source.require_captions:
        raise BadSampleError("no caption")
    payload = read()
    image = decode_image(payload, config.pixels, noted)
    return RawSample(
        name=name,
        draw=draws([len(payload)], [crc32(payload)]).item(),
        extension=extension or extension_of(payload),
        image=payload,
        caption=captions[0] if captions else "",
        width=image.width,
        height=image.height,
        label=label,
        metadata=fields,
        noted=noted,
    )


def _with_captions(
    captions: Sequence[str], fields: dict[str, Any], noted: Counter[str], config: DataConfig
) -> dict[str, Any]:
    """Add the list of captions to the fields, where a training may draw from it."""
    draws_one = config.captions is CaptionForm.json
    if len(captions) > 1 and not draws_one:
        noted[SEVERAL_CAPTIONS] += 1
    if len(captions) > 1 or (captions and draws_one):
        return {JSON_FIELD: captions, **fields}
    return fields
