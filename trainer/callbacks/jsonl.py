"""metrics.jsonl: one JSON object a line, complete whatever else fails."""

import json
from pathlib import Path

from trainer import evaluations
from trainer.evaluations import Values, append_line, as_logged


class JsonLines:
    """Appends to metrics.jsonl; a resumed run drops the lines it is going to write again.

    Lines of evaluations that were jobs of their own come back: nobody writes them again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self.rewound(first_step)

    def metrics(self, step: int, values: Values) -> None:
        """Write one line."""
        append_line(self._path, json.dumps({"step": step, **values}))

    def picture(self, step: int, path: Path) -> None:
        """Pictures stay where they are."""

    def rewound(self, step: int) -> None:
        """Drop the lines of later steps."""
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step(line) <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        part.replace(self._path)
        # after the rename: what an evaluation appends from here on is in the new file
        for _, values in evaluations.found(self._path.parent):
            if (line := json.dumps(as_logged(values))) not in kept:
                append_line(self._path, line)

    def close(self) -> None:
        """Every line is there already."""


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut by a kill in the middle of the line
        return float("inf")
