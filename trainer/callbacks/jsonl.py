"""metrics.jsonl: one JSON object a line, complete even if other callbacks fail."""

import json
from collections.abc import Iterable
from pathlib import Path

from typing_extensions import override

from data.storage.atomic import append_lines
from trainer.callbacks.callback import Callback, Start
from trainer.runs.evaluations import Values, read_evaluations, to_log_line
from trainer.runs.files import CLOSE_S, RunFiles, change_lines, parse_record
from trainer.runs.paths import METRICS


def open_jsonl(start: Start) -> Callback:
    """Make the callback."""
    path = start.folder / METRICS
    return JsonLines(path, start.step, start.files, evaluated=start.evaluated)


class JsonLines(Callback):
    """Appends to metrics.jsonl; a resumed run removes the lines of steps that it repeats.

    It restores the lines of evaluations that ran as their own jobs: no job repeats these.
    """

    def __init__(
        self, path: Path, first_step: int, files: RunFiles | None = None, *, evaluated: bool = True
    ) -> None:
        """files: the writer of the run folder; its own by default.

        evaluated: whether the evaluation at `first_step` is not repeated.
        """
        self._name = path.name
        self._files = files or RunFiles(path.parent)
        self._cut(first_step, evaluated)

    @override
    def metrics(self, step: int, values: Values) -> None:
        """Write one line."""
        self._files.append(self._name, json.dumps({"step": step, **values}))

    @override
    def rewound(self, step: int) -> None:
        """Remove the lines of later steps."""
        self._cut(step, True)

    @override
    def close(self) -> None:
        """Wait for the lines that are on their way to a disk that works."""
        self._files.flush(CLOSE_S, past_failures=False)

    def _cut(self, step: int, evaluated: bool) -> None:
        def keeps(line: str) -> bool:
            values = parse_record(line)
            own = values.get("step")
            if not isinstance(own, int | float) or own > step:
                return False
            return evaluated or own < step or not any(name.startswith("eval/") for name in values)

        def mend(path: Path) -> None:
            kept: list[str] = []

            def change(lines: list[str]) -> list[str]:
                kept.extend(_without_doubles(filter(keeps, lines)))
                return kept

            change_lines(path, change)
            # after the rename: an evaluation that ends now appends to the new file
            found = (json.dumps(to_log_line(own)) for _, own in read_evaluations(path.parent))
            append_lines(path, [line for line in found if line not in kept])

        self._files.rewrite(self._name, mend, keeps)


def _without_doubles(lines: Iterable[str]) -> list[str]:
    """Return the last of all lines that record the same numbers of the same step.

    Texts, such as the hash of a protocol, tell records of the same numbers apart.
    """
    last: dict[tuple[object, ...], str] = {}
    for line in lines:
        values = parse_record(line)
        texts = ((key, own if isinstance(own, str) else "") for key, own in values.items())
        last[(values["step"], *sorted(texts))] = line
    return list(last.values())
