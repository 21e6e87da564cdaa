"""The rows of the GPU benchmark: what they run, need and were predicted to show.

This file needs nothing beside Python, so a row whose packages are missing is named and left out.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Figure = float | int | str
PREDICTIONS = Path("tests", "benchmarks", "gpu", "predictions.json")
"""Below the project's folder. Written before the first run, and not changed after it."""
NETWORKS = ("torch", "numpy", "yaml")
TRAINER = (
    *("torch", "numpy", "yaml", "deepspeed", "hydra", "omegaconf", "webdataset", "braceexpand"),
    *("fsspec", "isal", "tenacity", "safetensors", "open_clip", "ftfy", "PIL", "pyarrow", "psutil"),
)
"""Packages by the names of their imports."""


class Row(NamedTuple):
    """One measurement, in a process of its own."""

    name: str
    function: str
    """MODULE:FUNCTION below tests.benchmarks.gpu."""
    seconds: float
    """What it needs; it is stopped after twice as long."""
    packages: Sequence[str]
    about: str

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


ROWS = (
    Row("ceilings", "ceilings:measure", 20, NETWORKS, "versions, kernels, peak rates"),
    Row("correctness", "correctness:measure", 25, (*NETWORKS, "pytest"), "tests/gpu"),
    Row(
        "numerics",
        "numerics:measure",
        40,
        (*NETWORKS, "diffusers", "safetensors"),
        "SD 2's U-Net against diffusers', same weights",
    ),
    Row("steps", "steps:measure", 75, NETWORKS, "training steps of SD 2's U-Net"),
    Row("compiled", "steps:measure_compiled", 85, NETWORKS, "the same, compiled by block"),
    Row("precompute", "stores:measure", 40, TRAINER, "256 pictures of 512 px"),
    Row("training", "trainings:measure", 70, TRAINER, "laion_512, 12 steps of 64"),
    Row("plan", "trainings:measure_plan", 20, TRAINER, "trainer.plan beside that training"),
    Row("resume", "trainings:measure_resume", 40, TRAINER, "SIGTERM at step 6, then resumed"),
    Row("text", "stores:measure_text", 15, TRAINER, "ViT-H's text tower, 64 captions"),
    Row("drawing", "drawing:measure", 30, TRAINER, "an evaluation's drawing and decoding"),
    Row("faults", "trainings:measure_faults", 10, TRAINER, "too large a batch, a NaN"),
)
ROWS_ON_SEVERAL = (
    Row("bandwidth", "several:measure_bandwidth", 30, TRAINER, "collectives"),
    Row("several precompute", "stores:measure", 40, TRAINER, "the data of the next rows"),
    Row("stages", "several:measure_stages", 240, TRAINER, "ZeRO 0 to 3 on one GPU and on all"),
    Row("topology", "several:measure_topology", 150, TRAINER, "a stop; resumed on half the GPUs"),
)


class Prediction(NamedTuple):
    """What a figure should be: from `low` to `high`, and why."""

    low: float
    high: float
    unit: str
    source: str

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g} {self.unit}".rstrip()
        return f"{self.low:g} to {self.high:g} {self.unit}".rstrip()


def predictions(root: Path) -> dict[str, dict[str, Prediction]]:
    """Row → figure → prediction; root: the project's folder."""
    rows: dict[str, dict[str, Any]] = json.loads((root / PREDICTIONS).read_text())
    return {
        row: {figure: Prediction(**fields) for figure, fields in figures.items()}
        for row, figures in rows.items()
    }


def read_notes(path: Path) -> dict[str, Figure]:
    """The figures that a row has noted so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def figure_lines(
    figures: Mapping[str, Figure], predicted: Mapping[str, Prediction], *, on_gpu: bool
) -> list[str]:
    """`what  measured  predicted  within or not`, a figure a line."""
    lines: list[str] = []
    for name, value in figures.items():
        verdict = "" if on_gpu else "cpu, figures mean nothing"
        prediction = predicted.get(name)
        if prediction is not None and on_gpu:
            right = is_within(value, prediction)
            verdict = f"predicted {prediction}: {'within' if right else 'NOT within'}"
        lines.append(f"  {name:<44}{value!s:>14}  {verdict}".rstrip())
    return lines


def is_within(value: Figure, prediction: Prediction) -> bool:
    """Whether a figure was foreseen."""
    return not isinstance(value, str) and prediction.low <= value <= prediction.high


def table(predicted: Mapping[str, Mapping[str, Prediction]]) -> str:
    """The table of docs/benchmarks.md before the first run."""
    lines = ["| row | figure | predicted | measured |", "|---|---|---|---|"]
    for row in (*ROWS, *ROWS_ON_SEVERAL):
        for name, one in predicted.get(row.name, {}).items():
            lines.append(f"| {row.name} | `{name}` | {one} | not yet run |")
    return "\n".join(lines)
