"""Checkpoints: a folder of safetensors and JSON that knows no world size and no ZeRO stage.

    checkpoints/step_00001000/
        rank_00000.safetensors …   fp32 tensors named kind/parameter, spread over the ranks;
                                   of modules beside the first, module.kind/parameter
        state.json                 counters, cursor, config, W&B id
        manifest.json              size and SHA-256 of every file, written last

Ranks write in the background; rank 0 commits by renaming the folder once every file is there, so
a folder without a manifest was never a checkpoint. Nothing here can execute code.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.averages import average_kind, averages
from trainer.config import Config, EmaConfig
from trainer.distributed import Ranks

FORMAT_VERSION = 1
COMMIT_TIMEOUT_S = 1800
MANIFEST = "manifest.json"
STATE = "state.json"


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
        for name in self.files:
            if name.endswith(".safetensors"):
                with safe_open(self.path / name, "pt") as file:
                    for key in list(file.keys()):
                        kind, parameter = key.split("/", 1)
                        if kind in found:
                            found[kind][parameter] = file.get_tensor(key)
        return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint after checking every byte of it.

    Raises: ValueError that names the first file which is missing, extra or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected: dict[str, dict[str, Any]] = manifest["files"]
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint: its {MANIFEST} cannot be read") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path / MANIFEST}: format {version}, not {FORMAT_VERSION}")
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if present != set(expected):
        raise ValueError(f"{path}: missing or extra {sorted(present ^ set(expected))}")
    for name, entry in expected.items():
        if _describe(path / name) != entry:
            raise ValueError(f"{path / name} is damaged: it does not match {MANIFEST}")
    state = json.loads((path / STATE).read_bytes())
    return Checkpoint(path, state, tuple(expected))


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, found by looking; a damaged one is named and passed over."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return open_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    return None


def chosen_checkpoint(config: Config) -> Checkpoint:
    """The checkpoint at checkpoint.load or, where that is empty, the newest of the run.

    Raises: ValueError or FileNotFoundError where there is none.
    """
    if config.checkpoint.load:
        return open_checkpoint(Path(config.checkpoint.load))
    folder = Path(config.run.dir) / "checkpoints"
    found = latest_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(
            f"checkpoint.load: no checkpoint in {folder}; train first with "
            f"python -m trainer +experiment={config.run.experiment} run.name={config.run.name}"
        )
    return found


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and keeps the newest few."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder = folder
        self._ranks = ranks
        self._keep = keep
        self._thread: threading.Thread | None = None
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".step_*"):
                shutil.rmtree(leftover)
        ranks.barrier()

    def save(
        self,
        step: int,
        tensors: Iterable[tuple[str, str, Tensor]],
        buffers: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Copy this rank's share to host memory, then write it while training goes on.

        `tensors` yields (kind, name, full tensor) on every rank alike, `buffers` are kind/name and
        tensor of rank 0; a save that is still being written is waited for.
        """
        self.wait()
        share = self._own_share(tensors)
        if self._ranks.is_main:
            share |= {name: _host_copy(value) for name, value in buffers.items()}
        document = json.dumps(dict(state), indent=1).encode()
        self._thread = threading.Thread(
            target=self._write, args=(step, share, document), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _own_share(self, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Give each tensor to the rank with the fewest bytes so far: the same split everywhere."""
        load = [0] * self._ranks.world_size
        share: dict[str, Tensor] = {}
        for kind, name, tensor in tensors:
            owner = load.index(min(load))
            load[owner] += tensor.numel()
            if owner == self._ranks.rank:
                share[f"{kind}/{name}"] = _host_copy(tensor)
        return share

    def _write(self, step: int, share: dict[str, Tensor], state: bytes) -> None:
        part = self._folder / f".step_{step:08d}"
        part.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._ranks.rank:05d}.safetensors"
        try:
            save_file(share, part / f"{name}.part")
            _sync(part / f"{name}.part")
            (part / f"{name}.part").rename(part / name)
            receipt: dict[str, Any] = {name: _describe(part / name)}
        except (OSError, SafetensorError) as error:  # the latter hides a full disk
            receipt = {"error": f"{part / name}: {error}"}
        try:
            if not self._ranks.is_main:
                _write_synced(part / f".{name}.receipt", json.dumps(receipt).encode())
            else:
                self._commit(part, receipt, state)
        except OSError as error:
            # training goes on with the previous checkpoint; the next save may find more space
            if self._ranks.is_main:
                shutil.rmtree(part, ignore_errors=True)
            print(f"warning: no checkpoint at step {step}: {error}", file=sys.stderr, flush=True)

    def _commit(self, part: Path, receipt: dict[str, Any], state: bytes) -> None:
        receipts = [receipt, *(self._receipt(part, r) for r in range(1, self._ranks.world_size))]
        files: dict[str, Any] = {}
        for entry in receipts:
            if "error" in entry:
                raise OSError(entry["error"])
            files |= entry
        _write_synced(part / STATE, state)
        files[STATE] = _describe(part / STATE)
        manifest = {"version": FORMAT_VERSION, "files": files}
        _write_synced(part / MANIFEST, json.dumps(manifest, indent=1).encode())
        final = part.with_name(part.name.removeprefix("."))
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync(self._folder)
        for old in sorted(self._folder.glob("step_*"))[: -self._keep]:
            shutil.rmtree(old)

    def _receipt(self, part: Path, rank: int) -> dict[str, Any]:
        path = part / f".rank_{rank:05d}.safetensors.receipt"
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise OSError(f"rank {rank} did not write its part in {COMMIT_TIMEOUT_S} s")
            time.sleep(0.02)
        receipt = json.loads(path.read_bytes())
        path.unlink()
        return receipt


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(
        tensor.detach()
    )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    _sync(part)
    part.rename(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
