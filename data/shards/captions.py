"""Captions of a sample: found in its members, of any type, and one of them chosen."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from typing import Self

from data.config import CaptionForm, DataConfig, MixtureConfig
from data.shards.codecs import (
    CAPTION_EXTENSIONS,
    REPLACED_BYTES,
    BadSampleError,
    Buffer,
    decode_json,
    decode_text,
)
from data.storage.documents import is_json_array, is_json_object, lookup

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
JSON_FIELD = "captions"
LISTED = ((JSON_FIELD, 1.0),)
"""The field that holds the captions where no other is named, and its weight."""

Member = Callable[[str], Buffer | None]
"""Extension → the sample's member, or None."""


@dataclass(frozen=True, slots=True)
class CaptionRule:
    """Where the captions of a data set are, and how they are drawn."""

    form: CaptionForm = CaptionForm.text
    fields: tuple[tuple[str, float], ...] = LISTED
    """json: names of the fields, and their weights."""
    encoding: str = "utf-8"
    required: bool = True
    """Whether a sample without a caption is a bad one; else its caption is empty."""

    @classmethod
    def of(cls, config: DataConfig, member: MixtureConfig | None = None) -> Self:
        """Return the rule of a config, for one set of its mixture or for its only set."""
        form = config.captions
        fields = tuple((field.name, field.weight) for field in config.caption_fields)
        if member is not None and member.captions is not None:
            form = member.captions
            fields = ((member.caption_field, 1.0),) if member.caption_field else ()
        return cls(form, fields or LISTED, config.encoding, config.source.require_captions)

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the members that hold captions, the preferred one first."""
        forms = {CaptionForm.json: ("json",), CaptionForm.label: ("cls",)}
        return forms.get(self.form, CAPTION_EXTENSIONS)

    @property
    def several(self) -> str:
        """Name of the place of several captions, with the order of the fields; empty for one."""
        if self.form is CaptionForm.json:
            return f"json {', '.join(name for name, _ in self.fields)}"
        return "lines" if self.form is CaptionForm.lines else ""

    @property
    def is_plain(self) -> bool:
        """Whether each sample has one caption, in UTF-8."""
        return self.form is CaptionForm.text and self.encoding == "utf-8"


PLAIN_CAPTIONS = CaptionRule()


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one sample, at least one."""

    texts: list[str]
    weights: list[float]
    """Part of the visits that take each caption, in any scale."""

    def place(self, draw: float) -> int:
        """Return the number of the caption in whose share a draw falls.

        draw: from [0, 1); 0 chooses the first.
        """
        ends = list(accumulate(self.weights))
        return next(
            (place for place, end in enumerate(ends) if draw * ends[-1] < end), len(ends) - 1
        )


def choose_caption(
    member: Member, rule: CaptionRule, draw: float = 0.0, noted: Counter[str] | None = None
) -> str:
    """Return one of a sample's captions, or its class.

    draw: from [0, 1), chooses among several captions; 0 chooses the first. noted, and errors: as
    `read_captions`.
    """
    captions = read_captions(member, rule, noted)
    return captions.texts[captions.place(draw)]


def read_captions(member: Member, rule: CaptionRule, noted: Counter[str] | None = None) -> Captions:
    """Return all captions of a sample.

    noted: counts remarks, as `decode_text` does.
    Raises: BadSampleError where the sample lacks a caption that is required, or has one that cannot
    be read.
    """
    texts: list[str] = []
    weights: list[float] = []
    if rule.form is CaptionForm.json:
        payload = member("json")
        values: object = None if payload is None else decode_json(payload)
        for name, weight in rule.fields:
            found = texts_of(lookup(values, name)) if is_json_object(values) else []
            texts += found
            weights += [weight / max(len(found), 1)] * len(found)
        problem = f"no text in field {' or '.join(name for name, _ in rule.fields)} of its JSON"
    else:
        found = (payload for name in rule.members if (payload := member(name)) is not None)
        payload, problem = next(found, None), "no caption"
        if payload is not None:
            text = decode_text(payload, rule.encoding, noted)
            lines = text.splitlines() if rule.form is CaptionForm.lines else [text]
            texts = [line for line in map(str.strip, lines) if line] or [""]
            weights = [1.0] * len(texts)
    if not texts and rule.required:
        raise BadSampleError(problem)
    return Captions(texts, weights) if texts else Captions([""], [1.0])


def texts_of(
    value: object, encoding: str = "utf-8", noted: Counter[str] | None = None
) -> list[str]:
    """Return the captions in a value of any type: none, one, or those of a list or an object.

    A number is written as text, 3.0 as `3`. Bytes are decoded. Empty texts and null are left out.
    encoding: of bytes. noted: counts REPLACED_BYTES once.
    Raises: BadSampleError where a value is true, false or of another type.
    """
    replaced: Counter[str] = Counter()
    found = [text for text in map(str.strip, _texts(value, encoding, replaced)) if text]
    if noted is not None and replaced:
        noted[REPLACED_BYTES] += 1
    return found


def mended(text: str) -> str:
    """Replace by U+FFFD what the error handler `surrogateescape` makes of bytes."""
    return _ESCAPED_BYTE.sub("\ufffd", text)


def _texts(value: object, encoding: str, replaced: Counter[str]) -> Iterator[str]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if isinstance(value, str):
        text = mended(value)
        replaced.update([REPLACED_BYTES] * (text != value))
        yield text
    elif isinstance(value, bytes):
        yield decode_text(value, encoding, replaced)
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        whole = math.isfinite(value) and value == int(value)
        yield str(int(value) if whole else value)
    elif is_json_array(value):
        # pyarrow gives a map as a list of (key, value)
        pairs = bool(value) and all(isinstance(entry, tuple) for entry in value)
        for entry in [pair[1] for pair in value] if pairs else value:
            yield from _texts(entry, encoding, replaced)
    elif is_json_object(value):
        for entry in value.values():
            yield from _texts(entry, encoding, replaced)
    else:
        shown = str(value).lower() if isinstance(value, bool) else type(value).__name__
        raise BadSampleError(f"caption is {shown}, not a text")
