"""Names of the files and folders in a run folder."""

from contextlib import suppress
from pathlib import Path

CONFIG = "config.yaml"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
"""The last file of a checkpoint: a folder without it is no checkpoint."""
PINS = ".pins"
"""Folder beside the checkpoints: leases of the processes that read them."""
WANDB_ID = "wandb_id.json"
SAMPLES = "samples"
EVALUATIONS = "evaluations"
PROTOCOLS = "protocols"
SWEEPS = "sweeps"
STACKS = "stacks"
"""Stacks of every rank of a job that hung, from the watchdog."""
DATA = "data.json"
"""The account of the data set, and the names of its classes."""
HISTORY = "history.jsonl"
"""Starts of the run, with the options that changed between them, and disks that failed."""
INCIDENTS = "incidents.jsonl"
"""Skipped steps, rewinds and other actions of the guards."""
QUARANTINE = "quarantine.jsonl"
"""Samples that were replaced in training."""
REPORT = "report.html"
SNAPSHOTS = Path("ema", "snapshots")
"""Snapshots of power-function averages."""

STEPS = "step_*"
"""Glob pattern of the names that `step_name` returns."""


def step_name(step: int) -> str:
    """Return the name of a file or folder of optimizer step `step`, such as a checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the optimizer step in the name of a path; the name ends in `step_name`."""
    return int(path.stem.rpartition("_")[2])


def steps_in(folder: Path, prefix: str = "") -> dict[int, Path]:
    """Return the files and folders that `step_name` names, by step in ascending order.

    prefix: what stands before `step_name` in their names. Only whole names count: a folder also
    holds copies, notes and files of other systems (`._step_00000002`).
    Raises: OSError where the folder cannot be listed; a folder that is missing has none.
    """
    found: dict[int, Path] = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            digits = path.name.removeprefix(f"{prefix}step_")
            if digits.isdecimal() and path.name == f"{prefix}{step_name(int(digits))}":
                found[int(digits)] = path
    return dict(sorted(found.items()))


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the folders of checkpoints, damaged or not, by step; a link to a folder counts.

    Raises: OSError of `steps_in`: a run that finds no checkpoint starts again from step 0, and it
    must not take a disk that is away for an empty one.
    """
    return {step: path for step, path in steps_in(folder).items() if path.is_dir()}


def newest_checkpoint(run: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, damaged or not; None without one.

    Raises: OSError of `checkpoints_in`.
    """
    return next(reversed(checkpoints_in(run / CHECKPOINTS).values()), None)
