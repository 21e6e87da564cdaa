"""The raw data and the options that a data set was made from, as its manifest keeps them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from data.config import DataConfig, SourceConfig
from data.secrets import public
from data.shards.annotations import AnnotationRule
from data.shards.captions import CaptionRule
from data.storage.documents import DocumentError, is_json_object, parse_json
from data.text import printable

LONGEST_VALUE = 80
"""[characters] Longest value of an option in a message."""
RAW = "data.source.path"
FILES = "files"
"""Entry for the hash of the state of registered tars and tables."""
HIDDEN = "hidden"
"""Entry for the hash of options that a manifest shows without their secrets."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What decides the shards of a data set."""

    options: dict[str, Any]
    """Config path → value, as JSON."""
    raw: str
    """Fingerprint of the raw data; of tars, their places alone."""
    former: str
    """The same as earlier versions took it."""
    files: str = ""
    """State of the tars and tables that are registered where they lie."""

    @classmethod
    def of(cls, data: DataConfig, raw: str, *, former: str = "", files: str = "") -> "Origin":
        """Collect the options that decide the shards; raw, former, files: as the fields."""
        source, plain = data.source, SourceConfig()
        later = {
            f"data.source.{name}": getattr(source, name)
            for name in ("file_field", "caption_field", "image_field", "label_field")
            if getattr(source, name) != getattr(plain, name)
        }
        later |= {f"data.{name}": True for name in ("maps", "boxes") if getattr(data, name)}
        rule = AnnotationRule.of(data)
        named = {"data.source.map_classes": rule.labels.maps}
        named |= {"data.source.box_classes": rule.labels.boxes}
        later |= {option: names for option, names in named.items() if names}
        if (rule := CaptionRule.of(data)) != CaptionRule(required=source.require_captions):
            later["data.captions"] = [rule.form.value, rule.fields, rule.encoding]
        return cls(
            # options that came later count where they are set: earlier entries lack them
            {
                "data.source.kind": source.kind.value,
                "data.source.shard_samples": source.shard_samples,
                "data.source.val_share": source.val_share,
                "data.source.require_captions": source.require_captions,
                "data.filters": [asdict(rule) for rule in data.filters],
                **json.loads(json.dumps(later)),
            },
            raw,
            former or raw,
            files,
        )

    def text(self) -> str:
        """Return the entry `source` of a manifest."""
        shown = public(self.options)
        hidden = {} if shown == self.options else {HIDDEN: _hash(json.dumps(self.options))}
        files = {FILES: _hash(self.files)} if self.files else {}
        return json.dumps({**shown, **hidden, RAW: _hash(self.raw), **files})

    def has_newer_files(self, stored: str) -> bool:
        """Say whether registered tars or tables have changed since a manifest's entry was made.

        An entry without their state, of an earlier version, says nothing of changes.
        """
        entry = _parse(stored)
        return FILES in entry and entry[FILES] != _hash(self.files)

    def differences(self, stored: str) -> str:
        """Say how this origin differs from a manifest's entry; empty if it does not."""
        if stored == _hash(json.dumps([*self.options.values(), self.former])):
            return ""  # the entry that 0.1.0 wrote
        other = _parse(stored)
        if not other:  # a hash of 0.1.0 does not tell what was hashed
            return f"one or more of {', '.join([*self.options, RAW])}"
        own = json.loads(self.text())
        found = [
            f"{path} was {_shown(other.get(path))} and is {_shown(own.get(path))}"
            for path in {**own, **other}
            if path not in (RAW, HIDDEN, FILES) and other.get(path) != own.get(path)
        ]
        if not found and other.get(HIDDEN) != own.get(HIDDEN):
            found = ["a value from the environment in data.filters has changed"]
        if not found and other.get(RAW) not in (own[RAW], _hash(self.former)):
            found = [f"other files at {RAW}"]
        return ", ".join(found)


def _parse(stored: str) -> dict[str, Any]:
    """Return a manifest's entry; empty for the hash of 0.1.0."""
    try:
        entry = parse_json(stored)
    except DocumentError:
        return {}
    return entry if is_json_object(entry) else {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: object) -> str:
    return printable(json.dumps(value), LONGEST_VALUE)
