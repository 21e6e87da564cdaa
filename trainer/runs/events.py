"""The history of a run, history.jsonl.

Its starts, the options that changed between them, damaged checkpoints that a start skipped, and
disks that failed for a while.
"""

import json
import time
from pathlib import Path
from typing import Any

from data.secrets import public
from data.storage.atomic import append_lines
from data.storage.documents import DocumentError, is_json_object, parse_json
from data.storage.untrusted import read_text
from trainer.runs.paths import HISTORY

MAX_BYTES = 2**26
"""Largest history that is read."""


def add_event(run: Path, step: int, event: str, **details: object) -> None:
    """Append an event after optimizer step `step` to the history of a run.

    details: JSON values.
    Raises: OSError if the file cannot be written.
    """
    append_lines(run / HISTORY, [event_line(event, step=step, **details)])


def event_line(event: str, **details: object) -> str:
    """Return the line of an event that happens now, without secrets; details: JSON values."""
    return json.dumps(public({"time": time.time(), "what": event, **details}))


def read_events(run: Path, name: str = HISTORY) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first; damaged lines are left out.

    name: the history, or incidents.jsonl, which has the same form.
    Raises: OSError if the file is no regular file of the run folder, or over MAX_BYTES.
    """
    try:
        text = read_text(run / name, limit=MAX_BYTES, below=run)
    except FileNotFoundError:
        return []
    events: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            event: object = parse_json(line)
        except DocumentError:  # a kill can cut the last line
            continue
        if is_json_object(event):
            events.append(event)
    return events
