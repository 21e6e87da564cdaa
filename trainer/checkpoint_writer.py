"""Writing checkpoints: in the background, by all ranks, and never at the cost of an older one.

Every rank writes its share into a hidden folder; rank 0 learns of all files, writes the manifest
and commits by renaming the folder. A save that fails or is killed leaves what was there before.
"""

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import (
    FOLDERS,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    Checkpoint,
    describe_file,
    encode_manifest,
    latest_checkpoint,
    step_of,
)
from trainer.distributed import Ranks
from trainer.host_memory import free_host_memory_bytes
from trainer.retention import Retention

FILE_BYTES = 2 * 2**30
MEMORY_SHARE = 0.5
"""Of the free host memory, what copies may take: the rest is training's, which is between steps."""
GB = 1e9


class CheckpointWriter:
    """Writes checkpoints of one folder, one at a time, and removes those that need not stay.

    step: where the run goes on from. What lies beyond it was found damaged; it is set aside, and
    removed once a newer checkpoint is there. Collective, as all that follows.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        retention: Retention,
        step: int,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._retention = retention
        self._file_bytes = file_bytes
        self._receipts = ranks.apart()
        self._ranks_here = ranks.gather(socket.gethostname()).count(socket.gethostname())
        self._thread: threading.Thread | None = None
        self._failure = ""
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f".*{FOLDERS}"):
                shutil.rmtree(leftover)
            for path in folder.glob(FOLDERS):
                if step_of(path) > step:
                    _replace(path, path.with_name(f"damaged_{path.name}"))
        ranks.barrier()

    @property
    def failed(self) -> bool:
        """Whether this rank knows of the last save that it came to nothing; rank 0 always does."""
        return bool(self._failure)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, once it is committed."""
        return self._folder / f"step_{step:08d}"

    def save(
        self,
        step: int,
        tensors: Iterable[tuple[str, str, Tensor]],
        num_bytes: int,
        buffers: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Copy this rank's share to host memory, then write it while training goes on.

        `tensors` yields (kind, name, full tensor that nobody changes) on every rank alike,
        `num_bytes` in all; `buffers` are kind/name and tensor of rank 0. Where the copies do not
        fit in free host memory, the share is written file by file before training goes on. A save
        that is still being written is waited for.
        """
        self.wait()
        self._failure = ""
        pieces = self._pieces(tensors, buffers)
        document = json.dumps(dict(state), indent=1).encode()
        if not self._fits(step, num_bytes):
            self._write(step, pieces, document)
            return
        self._thread = threading.Thread(
            target=self._write, args=(step, _taken(list(pieces)), document), name=f"save-{step}"
        )
        self._thread.start()

    def go_back(self, step: int) -> Checkpoint | None:
        """The newest checkpoint of at most this step, without the later ones.

        Those are removed: a run that is killed after this must not go on from them.
        """
        self.wait()
        self._ranks.barrier()
        found = latest_checkpoint(self._folder, self._ranks, step)
        if found is not None and self._ranks.is_main:
            for path in self._folder.glob(FOLDERS):
                if step_of(path) > found.step:
                    hidden = path.with_name(f".{path.name}")
                    path.rename(hidden)
                    shutil.rmtree(hidden)
        self._ranks.barrier()
        return found

    def wait(self) -> None:
        """Return when nothing is being written here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last save; raises OSError on every rank if it came to nothing."""
        self.wait()
        failure = self._ranks.first(lambda: self._failure)
        if failure:
            raise OSError(f"{failure}; make room and start again: the checkpoint before is intact")

    def _fits(self, step: int, num_bytes: int) -> bool:
        """Whether all ranks can hold copies of their shares beside the training."""
        needed = num_bytes / self._ranks.world_size * self._ranks_here
        free = free_host_memory_bytes()
        lacking = self._ranks.any(needed > MEMORY_SHARE * free)
        if lacking and self._ranks.is_main:
            print(
                f"step {step}: training waits while this checkpoint is written: copies of "
                f"{needed / GB:.1f} GB do not fit beside it in {free / GB:.1f} GB of free memory",
                flush=True,
            )
        return not lacking

    def _pieces(
        self, tensors: Iterable[tuple[str, str, Tensor]], buffers: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's share, a file's worth at a time.

        Each tensor goes to the rank with the fewest bytes so far: the same split everywhere.
        """
        load = [0] * self._ranks.world_size
        piece: dict[str, Tensor] = {}
        if self._ranks.is_main:
            piece |= {name: value.detach().to("cpu", copy=True) for name, value in buffers.items()}
        size = 0
        for kind, name, tensor in tensors:
            owner = load.index(min(load))
            load[owner] += tensor.nbytes
            if owner != self._ranks.rank:
                continue
            if size + tensor.nbytes > self._file_bytes and piece:
                yield piece
                piece, size = {}, 0
            piece[f"{kind}/{name}"] = tensor.to("cpu").contiguous()
            size += tensor.nbytes
        if piece:
            yield piece

    def _write(self, step: int, pieces: Iterable[dict[str, Tensor]], state: bytes) -> None:
        part = self._folder / f".step_{step:08d}"
        files: dict[str, Any] = {}
        failure = ""
        for number, piece in enumerate(pieces):
            if not failure:  # the pieces of other ranks come on all the same
                name = f"rank_{self._ranks.rank:05d}_{number:03d}.safetensors"
                try:
                    files[name] = _write_tensors(part / name, piece)
                except (OSError, SafetensorError) as error:  # the latter hides a full disk
                    failure = f"{part / name}: {error}"
            piece.clear()
        try:
            receipts = self._receipts.gather((files, failure))
            failure = next((reason for _, reason in receipts if reason), "")
            if failure:
                raise OSError(failure)
            if self._ranks.is_main:
                self._commit(part, {k: v for files, _ in receipts for k, v in files.items()}, state)
        except (OSError, RuntimeError) as error:  # the latter where a rank has gone
            self._failure = f"no checkpoint at step {step}: {error}"
            if self._ranks.is_main:
                shutil.rmtree(part, ignore_errors=True)
                print(f"warning: {self._failure}", file=sys.stderr, flush=True)

    def _commit(self, part: Path, files: dict[str, Any], state: bytes) -> None:
        _write_synced(part / STATE, state)
        files[STATE] = describe_file(part / STATE)
        manifest = encode_manifest({"version": FORMAT_VERSION, "files": files})
        _write_synced(part / MANIFEST, manifest)
        _sync(part)
        final = part.with_name(part.name.removeprefix("."))
        _replace(part, final)
        _sync(self._folder)
        present = {step_of(path): path for path in self._folder.glob(FOLDERS)}
        kept = self._retention.kept({step: _metrics(path) for step, path in present.items()})
        for step, path in present.items():
            if step not in kept:
                shutil.rmtree(path)
        for path in self._folder.glob(f"damaged_{FOLDERS}"):
            if step_of(path) <= step_of(final):
                shutil.rmtree(path)


def _taken(pieces: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The pieces in order, each no longer held here."""
    while pieces:
        yield pieces.pop(0)


def _metrics(path: Path) -> dict[str, float]:
    """What was measured at a checkpoint's step; nothing where it cannot be read."""
    try:
        values = json.loads((path / STATE).read_bytes())["metrics"]
        return {name: value for name, value in values.items() if isinstance(value, int | float)}
    except (OSError, ValueError, KeyError):
        return {}


def _replace(source: Path, target: Path) -> None:
    """Rename a folder, in the place of what is there."""
    if target.exists():
        old = target.with_name(f".old_{target.name}")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    _sync(path)
    return describe_file(path)


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
