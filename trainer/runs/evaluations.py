"""Files of evaluations that ran as their own jobs (`trainer.evaluate`), in the run folder.

    evaluations/step_00001000_0f1e2d3c4b5a.json   numbers of one checkpoint under one protocol
    protocols/0f1e2d3c4b5a.json                   the protocol

Such a job can end while the training runs, after the training was stopped, or after the training
went back to an earlier step. A resumed training cuts its log at its step, and then appends the
numbers of these files again. Until the training is done, it alone writes to W&B.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.storage.documents import is_json_object, read_json
from trainer.runs.paths import EVALUATIONS, STEPS

Values = Mapping[str, float | str]
"""Numbers, and hashes of protocols, by name."""


def read_evaluations(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and content of each evaluation of a run's checkpoints; skip damaged files."""
    for path in sorted((run / EVALUATIONS).glob(f"{STEPS}.json")):
        try:
            content: object = read_json(path, below=run)
        except (OSError, ValueError):
            continue
        if is_json_object(content) and isinstance(content.get("step"), int):
            yield path, content


def with_log_keys(values: Values, average: str = "") -> dict[str, float | str]:
    """Return numbers by their keys in logs.

    average: name of the average that was measured; empty for the run's first, which no key names.
    """
    prefix = f"eval/{average}/" if average else "eval/"
    return {f"{prefix}{name}": value for name, value in values.items()}


def to_log_line(content: Mapping[str, Any]) -> dict[str, float | str]:
    """Turn the content of an evaluation's file into a line of metrics.jsonl."""
    values = {name: value for name, value in content.items() if name not in ("step", "average")}
    return {"step": content["step"], **with_log_keys(values, content.get("average", ""))}
