"""metrics.jsonl: one JSON object a line, complete whatever else fails."""

import json
from collections.abc import Mapping
from pathlib import Path


class JsonLines:
    """Appends to metrics.jsonl; a resumed run drops the lines it is going to write again."""

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
            part = path.with_suffix(".part")
            part.write_text("".join(f"{line}\n" for line in kept))
            part.replace(path)
        self._file = path.open("a", buffering=1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, path: Path) -> None:
        """Pictures stay where they are."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut by a kill in the middle of the line
        return float("inf")
