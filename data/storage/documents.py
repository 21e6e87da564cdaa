"""Parse JSON and YAML of bounded size and depth, from files that a stranger may have written."""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from typing_extensions import override

from data.storage.untrusted import read_file

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 32
MAX_YAML_BYTES = 2**17
"""Far more than any config; PyYAML reads about 100 kB a second."""


class DocumentError(ValueError):
    """The error of a document that cannot be used; the message is the reason and names no file."""


def parse_json(payload: bytes | memoryview | str, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Decode JSON of at most `limit` bytes or characters, nested no deeper than MAX_JSON_DEPTH.

    Raises: DocumentError where it is larger, deeper or no JSON.
    """
    if len(payload) > limit:
        raise DocumentError(f"JSON of {len(payload)} bytes is over {limit}")
    try:
        value = json.loads(payload if isinstance(payload, str) else bytes(payload))
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"JSON cannot be read ({type(error).__name__})") from error
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        nested = [item for item in level if is_json_object(item) or is_json_array(item)]
        if not nested:
            return value
        children = (item.values() if isinstance(item, dict) else item for item in nested)
        level = list(chain.from_iterable(children))
    raise DocumentError(f"JSON is nested deeper than {MAX_JSON_DEPTH}")


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, below: Path | None = None) -> Any:
    """Read a JSON file of at most `limit` bytes.

    below: folder that the file must lie in; see `open_regular`.
    Raises: DocumentError where it is no JSON of bounded depth; UnsafeFileError where it is larger,
    no regular file, or outside of `below`; OSError where it cannot be read.
    """
    return parse_json(read_file(path, limit=limit, below=below), limit=limit)


def parse_yaml(text: str) -> Any:
    """Decode YAML of plain values: without aliases, which can double a document at every line.

    Raises: DocumentError where it is over MAX_YAML_BYTES characters, has an alias, or is no YAML.
    """
    if len(text) > MAX_YAML_BYTES:
        raise DocumentError(f"YAML of {len(text)} characters is over {MAX_YAML_BYTES}")
    try:
        return yaml.load(text, _PlainLoader)
    except Exception as error:
        # PyYAML's constructors raise nearly every built-in exception for damaged input
        raise DocumentError(f"YAML cannot be read ({type(error).__name__})") from error


def is_json_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Say whether a value decoded from JSON is an object."""
    return isinstance(value, dict)


def is_json_array(value: object) -> TypeGuard[list[Any]]:
    """Say whether a value decoded from JSON is an array."""
    return isinstance(value, list)


def lookup(fields: Mapping[str, Any], name: str) -> object:
    """Find a field by its name, or by a dotted path into nested objects; None if it is missing."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    nested = fields.get(outer)
    return lookup(nested, inner) if dot and is_json_object(nested) else None


class _PlainLoader(yaml.SafeLoader):
    """Builds plain values, and refuses aliases."""

    @override
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise DocumentError("an alias")
        return super().compose_node(parent, index)
