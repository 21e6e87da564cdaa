"""The format of checkpoints, for any world size and ZeRO stage, and their reading.

    checkpoints/step_00001000/
        rank_00000_000.safetensors …   fp32 tensors named kind/parameter, spread over the ranks,
                                       in files of about 2 GiB; module.kind/parameter for
                                       modules that are not averaged
        state.json                     counters, cursor, config, metrics, W&B id (state.py)
        manifest.json                  size and SHA-256 of every file, written last

A folder without a manifest is no checkpoint. No file can execute code.
`trainer/checkpoints/writer.py` writes checkpoints.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.storage.documents import parse_json
from data.storage.lease import Lease
from data.storage.untrusted import open_regular, read_file
from trainer.checkpoints.identity import check_draw
from trainer.checkpoints.pins import pin
from trainer.checkpoints.state import RunState, SnapshotState, parse_state
from trainer.config import Config
from trainer.options import did_you_mean
from trainer.runs.paths import CHECKPOINTS, MANIFEST, checkpoints_in
from trainer.runtime.ranks import ALONE, Ranks

FORMAT_VERSION = 2
MAX_MANIFEST_BYTES, MAX_STATE_BYTES = 2**26, 2**27
STATE = "state.json"

Reader = Callable[[str, str], Tensor]
"""(kind, parameter name) → full tensor on the CPU."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    path: Path
    state: RunState | SnapshotState
    files: tuple[str, ...]
    pin: Lease | None = field(default=None, repr=False, compare=False)
    """Keeps the files from retention for as long as this object is in use."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def training(self) -> RunState:
        """The state of a run. Raises: ValueError for a snapshot, which holds averages only."""
        if not isinstance(self.state, RunState):
            raise ValueError(f"{self.path} is a snapshot of averages: no run can resume from it")
        return self.state

    @property
    def snapshot(self) -> SnapshotState:
        """The state of a snapshot. Raises: ValueError for a checkpoint of a run."""
        if not isinstance(self.state, SnapshotState):
            raise ValueError(f"{self.path} is a checkpoint, not a snapshot of averages")
        return self.state

    def average(self, name: str) -> tuple[str, dict[str, Tensor]]:
        """Return the name of an average and its weights, {parameter name: fp32 tensor on the CPU}.

        name: an average, or empty for the first one.
        Raises: ValueError naming ema.use and the averages of the checkpoint.
        """
        names = self.state.averages
        if not names:
            raise ValueError(f"ema.use: {self.path} has no averages")
        if name and name not in names:
            near = did_you_mean(name, names)
            raise ValueError(f"ema.use={name}: {self.path} has {', '.join(names)}{near}")
        chosen = name or names[0]
        kind = average_kind(chosen)
        return chosen, self.tensors(kind)[kind]

    def tensors(self, *kinds: str) -> dict[str, dict[str, Tensor]]:
        """Read all tensors of these kinds: {kind: {parameter name: tensor on the CPU}}."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        with self._opened() as files:
            for key, file in files.items():
                kind, parameter = key.split("/", 1)
                if kind in found:
                    found[kind][parameter] = file.get_tensor(key)
        return found

    def layout(self) -> dict[str, torch.Size]:
        """Return the shapes of all tensors, by kind/parameter name."""
        with self._opened() as files:
            return {key: torch.Size(file.get_slice(key).get_shape()) for key, file in files.items()}

    def shapes(self, kind: str) -> dict[str, torch.Size]:
        """Return the shapes of the tensors of a kind, by parameter name."""
        return {
            key.removeprefix(f"{kind}/"): shape
            for key, shape in self.layout().items()
            if key.startswith(f"{kind}/")
        }

    def check_layout(self, wanted: Mapping[str, torch.Size], option: str) -> None:
        """Check that the tensors are these, by kind/parameter name, with these shapes.

        option: the config path that names the checkpoint, for the error.
        Raises: ValueError naming a tensor that is missing, extra or of another shape.
        """
        found = self.layout()
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) == wanted.get(key):
                continue
            own = f"is {list(found[key])}" if key in found else "is missing"
            other = f"is {list(wanted[key])}" if key in wanted else "has no place"
            raise ValueError(
                f"{option}: {self.path} is of another network: its {key} {own}, and in this "
                f"config's network it {other}"
            )

    @contextmanager
    def reading(self, prefix: str = "") -> Generator[Reader]:
        """Open all files; yield a Reader, which prepends `prefix` to kinds."""
        with self._opened() as files:

            def read(kind: str, name: str) -> Tensor:
                key = f"{prefix}{kind}/{name}"
                return files[key].get_tensor(key)

            yield read

    @contextmanager
    def _opened(self) -> Generator[dict[str, Any]]:
        """Open all files; yield {kind/parameter name: file of the tensor}."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for name in self.files:
                if name.endswith(".safetensors"):
                    file = stack.enter_context(_open_tensors(self.path / name))
                    files |= dict.fromkeys(file.keys(), file)
            yield files


def _open_tensors(path: Path) -> AbstractContextManager[Any]:
    """Open a safetensors file; the types of safetensors are incomplete."""
    return safe_open(path, "pt")


def open_checkpoint(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Open a checkpoint and verify the hashes of its files; collective.

    Each rank verifies a share of the files; then the ranks exchange the results.
    Raises: ValueError on every rank, naming a file that is missing, extra or altered.
    """
    expected, problem = ranks.from_main(lambda: _read_manifest(path))
    own = list(expected)[ranks.rank :: ranks.world_size]

    def matches(name: str) -> bool:
        return _matches(path / name, expected[name])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = zip(own, pool.map(matches, own), strict=True)
        altered = [name for name, same in results if not same]
    damaged = sorted(name for names in ranks.gather(altered) for name in names)
    if damaged:
        problem = f"{path / damaged[0]} is damaged: it does not match {MANIFEST}"
    if problem:
        raise ValueError(problem)
    content = ranks.from_main(lambda: read_file(path / STATE, limit=MAX_STATE_BYTES, below=path))
    try:
        state = parse_state(parse_json(content, limit=MAX_STATE_BYTES))
    except ValueError as error:
        raise ValueError(f"{path / STATE}: {error}") from error
    number = path.name.removeprefix("step_")
    if number.isdecimal() and int(number) != state.step:
        raise ValueError(f"{path / STATE} is of step {state.step}: it is not this folder's")
    return Checkpoint(path, state, tuple(expected))


def latest_checkpoint(
    folder: Path,
    ranks: Ranks = ALONE,
    up_to: float = math.inf,
    damaged: Callable[[str], None] | None = None,
    *,
    pinned: bool = False,
) -> Checkpoint | None:
    """Return the newest undamaged checkpoint in a folder, None without one; collective.

    Rank 0 lists the folder, so all ranks return the same. Damaged checkpoints are skipped with a
    warning. up_to: largest optimizer step of the checkpoint. damaged: called on every rank with
    the problem of each damaged one. pinned: see `open_pinned`; if a training removes the checkpoint
    before it is pinned, the next newer one is taken.
    Raises: OSError where the folder cannot be listed.
    """
    tried: set[Path] = set()
    while True:
        listed = ranks.from_main(lambda: list(checkpoints_in(folder).items()))
        left = [path for step, path in reversed(listed) if path not in tried and step <= up_to]
        if not left:
            return None
        tried.add(left[0])
        try:
            return (open_pinned if pinned else open_checkpoint)(left[0], ranks)
        except ValueError as error:
            if not left[0].exists():
                continue
            if damaged is not None:
                damaged(str(error))
            if ranks.is_main:
                print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)


def open_pinned(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Open a checkpoint that a training may be about to remove; rank 0 pins it; collective.

    The pin lasts for as long as the returned object. Raises: ValueError like `open_checkpoint`.
    """
    held = pin(path) if ranks.is_main else None
    return replace(open_checkpoint(path, ranks), pin=held)


def chosen_checkpoint(config: Config, ranks: Ranks = ALONE) -> Checkpoint:
    """Open checkpoint.load or, if that is empty, the newest checkpoint of the run; collective.

    It is pinned against the retention of a training that goes on. Its config is compared with
    today's: a line says which options differ.
    Raises: ValueError if checkpoint.load is damaged, or if the checkpoint is of another model than
    the config's; FileNotFoundError if the run has no checkpoint.
    """
    found = _chosen(config, ranks)
    option = "checkpoint.load" if config.checkpoint.load else "run.dir"
    told = check_draw(config, found.state.config, found.path, option)
    if told and ranks.is_main:
        print(f"warning: {told}", file=sys.stderr, flush=True)
    return found


def open_named(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Open the checkpoint in a folder, or the newest one of a run's folder, pinned; collective.

    Raises: ValueError if it is damaged or there is none.
    """
    folder = path / CHECKPOINTS
    if not ranks.from_main(folder.is_dir):
        return open_pinned(path, ranks)
    found = latest_checkpoint(folder, ranks, pinned=True)
    if found is None:
        raise ValueError(f"{folder} has no checkpoint")
    return found


def _chosen(config: Config, ranks: Ranks) -> Checkpoint:
    if config.checkpoint.load:
        return open_named(Path(config.checkpoint.load), ranks)
    folder = Path(config.run.dir) / CHECKPOINTS
    found = latest_checkpoint(folder, ranks, pinned=True)
    if found is None:
        raise FileNotFoundError(
            f"checkpoint.load: no checkpoint in {folder}; train first with "
            f"python -m trainer +experiment={config.run.experiment} run.name={config.run.name}"
        )
    return found


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest: its size in bytes and its SHA-256.

    Raises: OSError where it cannot be read, or is no regular file of its folder.
    """
    with os.fdopen(open_regular(path, below=path.parent), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Encode a manifest; equal manifests have equal bytes."""
    return json.dumps(manifest, indent=1).encode()


def _read_manifest(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the entries by file name, and a problem of the folder; empty if it has none."""
    try:
        content = read_file(path / MANIFEST, limit=MAX_MANIFEST_BYTES, below=path)
        manifest = parse_json(content, limit=MAX_MANIFEST_BYTES)
        expected: dict[str, dict[str, Any]] = dict(manifest["files"])
        version = manifest["version"]
        present = {file.name for file in path.iterdir()} - {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        return {}, f"{path} is no checkpoint: its {MANIFEST} cannot be read"
    if content != encode_manifest(manifest):  # valid JSON can have a flipped bit
        return {}, f"{path / MANIFEST} is damaged"
    if version != FORMAT_VERSION:
        return {}, f"{path / MANIFEST}: format {version}, not {FORMAT_VERSION}"
    if STATE not in expected or present != set(expected):
        return {}, f"{path}: missing or extra {sorted(present ^ {STATE, *expected})}"
    return expected, ""


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return manifest_entry(path) == entry
    except OSError:  # a file that cannot be read counts as damaged
        return False


def average_kind(name: str) -> str:
    """Return the kind of an average's tensors in optimizer states and in checkpoints."""
    return f"ema.{name}"
