"""What a run keeps of its data set: the account of its samples, and the names of the classes."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.storage.atomic import write_atomic
from data.storage.documents import is_json_array, is_json_object, read_json
from data.text import words_of
from trainer.runs.paths import DATA

MAX_BYTES = 2**26
SHOWN = 20
"""Most names in an error."""


def write_data_set(run: Path, facts: Mapping[str, Any]) -> None:
    """Write what a report and prompts need of a data set, its `Manifest.facts`, to a run folder."""
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    write_atomic(run / DATA, text.encode(errors="backslashreplace"))


def read_data_set(run: Path) -> dict[str, Any]:
    """Return what `write_data_set` wrote; empty for a run of an earlier version.

    Raises: ValueError or OSError where the file cannot be used.
    """
    try:
        document = read_json(run / DATA, limit=MAX_BYTES, below=run)
    except FileNotFoundError:
        return {}
    if not is_json_object(document):
        raise ValueError(f"{run / DATA}: no description of a data set")
    return document


def read_classes(run: Path) -> list[str]:
    """Return the names of the classes of a run, by number; empty if it has none.

    Raises: as `read_data_set`.
    """
    names = read_data_set(run).get("classes", [])
    if not is_json_array(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{run / DATA}: classes is no list of names")
    return names


def numbers_of(prompts: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Replace the names of classes in prompts by their numbers; numbers stay.

    A name counts as it is in the data, or in words, in any case: `golden_retriever`,
    "Golden retriever".
    Raises: ValueError that lists names if a prompt is neither a name nor a number.
    """
    known = {_key(name): str(number) for number, name in enumerate(classes)}
    found: list[str] = []
    for prompt in prompts:
        number = known.get(_key(prompt))
        if number is None and classes and not prompt.strip().isdecimal():
            near = difflib.get_close_matches(_key(prompt), known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            names = ", ".join(words_of(name) for name in classes[:SHOWN])
            more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
            raise ValueError(
                f"sample.prompts: {prompt!r} is no class; {hint}The classes are {names}{more}"
            )
        found.append(prompt if number is None else number)
    return found


def _key(name: str) -> str:
    return words_of(name).casefold()
