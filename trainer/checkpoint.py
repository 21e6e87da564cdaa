"""Checkpoints: a folder of safetensors and JSON that knows no world size and no ZeRO stage.

    checkpoints/step_00001000/
        rank_00000_000.safetensors …   fp32 tensors named kind/parameter, spread over the ranks,
                                       in files of about 2 GiB; of modules beside the first,
                                       module.kind/parameter
        state.json                     counters, cursor, config, metrics, W&B id
        manifest.json                  size and SHA-256 of every file, written last

A folder without a manifest was never a checkpoint, and nothing here can execute code. This page
reads them; `trainer/checkpoint_writer.py` writes them.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.averages import average_kind, averages
from trainer.config import Config, EmaConfig
from trainer.distributed import ALONE, Ranks
from trainer.run_folder import MANIFEST

FORMAT_VERSION = 2
STATE = "state.json"
FOLDERS = "step_*"

Reader = Callable[[str, str], Tensor]
"""(kind, parameter name) → full tensor on the CPU."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose files match its manifest."""

    path: Path
    state: dict[str, Any]
    files: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])

    def check_averages(self, config: EmaConfig) -> None:
        """Raises ValueError naming the averages that a run cannot go on with, as it never began."""
        wanted = {average.name for average in averages(config)}
        if missing := wanted - set(self.state["averages"]):
            raise ValueError(
                f"ema: {self.path} has no {', '.join(sorted(missing))}: an average starts with its "
                "run; keep ema.decays and ema.sigma_rels, or choose another run.name"
            )

    def average(self, name: str) -> tuple[str, dict[str, Tensor]]:
        """The weights averaged as ema.use says, {parameter: tensor}; empty takes the first average.

        Returns the average's name, too. Raises: ValueError naming ema.use and what there is.
        """
        names: list[str] = self.state["averages"]
        if name and name not in names:
            raise ValueError(f"ema.use={name}: {self.path} has {', '.join(names)}")
        chosen = name or names[0]
        kind = average_kind(chosen)
        return chosen, self.tensors(kind)[kind]

    def tensors(self, *kinds: str) -> dict[str, dict[str, Tensor]]:
        """Read all tensors of these kinds: {kind: {name: tensor on the CPU}}."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        with self._opened() as files:
            for key, file in files.items():
                kind, parameter = key.split("/", 1)
                if kind in found:
                    found[kind][parameter] = file.get_tensor(key)
        return found

    def shapes(self, kind: str) -> dict[str, torch.Size]:
        """Names and shapes of the tensors of a kind."""
        with self._opened() as files:
            return {
                key.removeprefix(f"{kind}/"): torch.Size(file.get_slice(key).get_shape())
                for key, file in files.items()
                if key.startswith(f"{kind}/")
            }

    @contextmanager
    def reading(self, prefix: str = "") -> Iterator[Reader]:
        """Read tensors, whose kinds start with prefix, one at a time: no more need be in memory."""
        with self._opened() as files:

            def read(kind: str, name: str) -> Tensor:
                key = f"{prefix}{kind}/{name}"
                return files[key].get_tensor(key)

            yield read

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        """kind/name → the open file that holds it."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for name in self.files:
                if name.endswith(".safetensors"):
                    file = stack.enter_context(safe_open(self.path / name, "pt"))
                    files |= dict.fromkeys(file.keys(), file)
            yield files


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.rpartition("_")[2])


def open_checkpoint(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Open one checkpoint after checking every byte of it; collective.

    Each rank checks a share of the files, and all learn what any of them found.
    Raises: ValueError on every rank that names the first file which is missing, extra or altered.
    """
    expected, problem = ranks.first(lambda: _read_manifest(path))
    own = list(expected)[ranks.rank :: ranks.world_size]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        altered = [
            name
            for name, same in zip(
                own, pool.map(lambda name: _matches(path / name, expected[name]), own), strict=True
            )
            if not same
        ]
    damaged = sorted(name for names in ranks.gather(altered) for name in names)
    if damaged:
        problem = f"{path / damaged[0]} is damaged: it does not match {MANIFEST}"
    if problem:
        raise ValueError(problem)
    state = ranks.first(lambda: json.loads((path / STATE).read_bytes()))
    return Checkpoint(path, state, tuple(expected))


def latest_checkpoint(
    folder: Path, ranks: Ranks = ALONE, up_to: float = math.inf
) -> Checkpoint | None:
    """The newest undamaged checkpoint, the same on every rank; collective.

    It is found by looking, which rank 0 does for all; a damaged one is named and passed over.
    up_to: the last step that counts.
    """
    for path in ranks.first(lambda: sorted(folder.glob(FOLDERS), reverse=True)):
        if step_of(path) > up_to:
            continue
        try:
            return open_checkpoint(path, ranks)
        except ValueError as error:
            if ranks.is_main:
                print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    return None


def chosen_checkpoint(config: Config, ranks: Ranks = ALONE) -> Checkpoint:
    """The checkpoint at checkpoint.load or, where that is empty, the newest of the run; collective.

    Raises: ValueError or FileNotFoundError where there is none.
    """
    if config.checkpoint.load:
        return open_checkpoint(Path(config.checkpoint.load), ranks)
    folder = Path(config.run.dir) / "checkpoints"
    found = latest_checkpoint(folder, ranks)
    if found is None:
        raise FileNotFoundError(
            f"checkpoint.load: no checkpoint in {folder}; train first with "
            f"python -m trainer +experiment={config.run.experiment} run.name={config.run.name}"
        )
    return found


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one way in which a manifest is written."""
    return json.dumps(manifest, indent=1).encode()


def _read_manifest(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """What the files must be, and what is wrong with the folder, if anything."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
        expected: dict[str, dict[str, Any]] = dict(manifest["files"])
        version = manifest["version"]
        present = {file.name for file in path.iterdir()} - {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        return {}, f"{path} is no checkpoint: its {MANIFEST} cannot be read"
    if content != encode_manifest(manifest):  # a flipped bit that JSON does not mind
        return {}, f"{path / MANIFEST} is damaged"
    if version != FORMAT_VERSION:
        return {}, f"{path / MANIFEST}: format {version}, not {FORMAT_VERSION}"
    if STATE not in expected or present != set(expected):
        return {}, f"{path}: missing or extra {sorted(present ^ {STATE, *expected})}"
    return expected, ""


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return describe_file(path) == entry
    except OSError:  # a disk that cannot read it has damaged it
        return False
