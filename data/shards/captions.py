"""Choose one of the captions of a sample."""

from collections.abc import Callable
from typing import TypeGuard

from data.config import CaptionForm
from data.shards.codecs import (
    CAPTION_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_json,
    decode_text,
)
from data.storage.documents import is_json_array, is_json_object

JSON_FIELD = "captions"

Member = Callable[[str], Buffer | None]
"""Extension → the sample's member, or None."""


def choose_caption(member: Member, form: CaptionForm, draw: float = 0.0) -> str:
    """Return one of a sample's captions, or its class.

    form: place of the captions. draw: from [0, 1), chooses among several captions; 0 chooses the
    first. Raises: BadSampleError where the sample has no caption, or one that cannot be read.
    """
    captions = _read_list(member) if form is CaptionForm.json else _read_text(member, form)
    return captions[int(draw * len(captions))]


def _read_text(member: Member, form: CaptionForm) -> list[str]:
    for extension in CAPTION_EXTENSIONS:
        payload = member(extension)
        if payload is not None:
            text = decode_text(payload)
            if form is CaptionForm.text:
                return [text]
            return [line.strip() for line in text.splitlines() if line.strip()] or [""]
    raise BadSampleError("no caption")


def _read_list(member: Member) -> list[str]:
    payload = member("json")
    fields = None if payload is None else decode_json(payload)
    captions = fields.get(JSON_FIELD) if is_json_object(fields) else None
    if not is_text_list(captions) or not captions:
        raise BadSampleError(f"no list of {JSON_FIELD} in its JSON")
    return [caption.strip() for caption in captions]


def is_text_list(value: object) -> TypeGuard[list[str]]:
    """Say whether a value is a list of strings."""
    return is_json_array(value) and all(isinstance(entry, str) for entry in value)
