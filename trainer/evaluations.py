"""What `trainer.evaluate` leaves in a run folder, and how a training takes it up.

    evaluations/step_00001000_0f1e2d3c4b5a.json   numbers of one checkpoint under one protocol
    protocols/0f1e2d3c4b5a.json                   what that protocol is

An evaluation may end while the training runs, is stopped, or has gone on from an earlier step. So
the file is what lasts: a training that cuts its log when it resumes puts back the lines of these
files, and it alone writes to W&B until it is done.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Values = Mapping[str, float | str]


def write_protocol(run: Path, name: str, protocol: Mapping[str, object]) -> None:
    """Write a protocol under its hash, once."""
    path = run / "protocols" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(dict(protocol), indent=1) + "\n")
        part.replace(path)


def found(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a run's own checkpoints, with their numbers; damaged ones are passed over."""
    for path in sorted((run / "evaluations").glob("step_*.json")):
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield path, values


def logged(values: Values, average: str = "") -> dict[str, float | str]:
    """The numbers by their keys in logs, which name every average but a run's first."""
    prefix = f"eval/{average}/" if average else "eval/"
    return {f"{prefix}{name}": value for name, value in values.items()}


def as_logged(found: Mapping[str, Any]) -> dict[str, float | str]:
    """What a file of an evaluation says, as a line of metrics.jsonl."""
    values = {name: value for name, value in found.items() if name not in ("step", "average")}
    return {"step": found["step"], **logged(values, found.get("average", ""))}


def append_line(path: Path, line: str) -> None:
    """Append a line by one write, so that it stays whole beside another process's lines."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)
