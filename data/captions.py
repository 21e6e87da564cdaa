"""The captions of a sample, of which every visit takes one."""

from collections.abc import Callable

from data.codecs import CAPTION_EXTENSIONS, BadSampleError, Buffer, decode_json, decode_text
from data.config import CaptionForm

JSON_FIELD = "captions"

Member = Callable[[str], Buffer | None]
"""Extension → the sample's member, or None."""


def choose_caption(member: Member, form: CaptionForm, draw: float = 0.0) -> str:
    """Take one of a sample's captions, or its class.

    Args:
        member: Of the sample.
        form: Where its captions are.
        draw: From [0, 1): which of them; 0 is the first.

    Raises:
        BadSampleError: it has none, or none that can be read.
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
    found = fields.get(JSON_FIELD) if isinstance(fields, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise BadSampleError(f"no list of {JSON_FIELD} in its JSON")
    return [one.strip() for one in found]
