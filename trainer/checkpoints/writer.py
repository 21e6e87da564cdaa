"""Writing of checkpoints, in the background and by all ranks.

Every rank writes its share into a hidden folder. Rank 0 collects the names of all files, writes the
manifest and commits the checkpoint by renaming the folder. A save that fails or is killed does not
change older checkpoints. A save that cannot be written is tried again while the training goes on.
"""

import errno
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from data.storage.atomic import remove, replace_folder, write_atomic
from data.storage.documents import read_json
from trainer.checkpoints.pins import is_pinned
from trainer.checkpoints.reader import (
    FORMAT_VERSION,
    MAX_STATE_BYTES,
    STATE,
    Checkpoint,
    encode_manifest,
    latest_checkpoint,
    manifest_entry,
)
from trainer.checkpoints.retention import Retention
from trainer.checkpoints.state import RunState, WeightsState, parse_state
from trainer.checkpoints.tensors import write_tensors
from trainer.runs.outages import Outages, retry_delays
from trainer.runs.paths import MANIFEST, checkpoints_in, step_name, steps_in
from trainer.runtime.host_memory import free_host_memory_bytes
from trainer.runtime.ranks import Ranks

FILE_BYTES = 2 * 2**30
"""Size at which a rank begins a new file."""
MEMORY_SHARE = 0.5
"""Largest share of the free host memory for copies; the training needs the rest."""
DAMAGED = "damaged_"
"""Prefix of the names of checkpoints that were set aside."""
GB = 1e9


class CheckpointWriter:
    """Writes checkpoints into one folder, one at a time, and removes those that are not kept.

    step: the step at which the run starts or resumes; later checkpoints in the folder are damaged.
    They are renamed at once, and removed after the next save. The constructor and all methods are
    collective.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        retention: Retention,
        step: int,
        file_bytes: int = FILE_BYTES,
        outages: Outages | None = None,
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._retention = retention
        self._file_bytes = file_bytes
        self._thread_ranks = ranks.for_thread()
        self._ranks_here = ranks.gather(socket.gethostname()).count(socket.gethostname())
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._outages = outages or Outages()
        self._give_up_s = math.inf
        self._hurry = threading.Event()
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for prefix in (".", ".old_"):
                for leftover in steps_in(folder, prefix).values():
                    remove(leftover)
            for later, path in checkpoints_in(folder).items():
                if later > step:
                    replace_folder(path, path.with_name(f"{DAMAGED}{path.name}"))
        ranks.barrier()

    @property
    def failed(self) -> bool:
        """Whether the last save failed; another rank than 0 may miss a failure."""
        return bool(self._failure)

    def path(self, step: int) -> Path:
        """Return the folder of a step's committed checkpoint."""
        return self._folder / step_name(step)

    def save(
        self,
        step: int,
        tensors: Iterable[tuple[str, str, Tensor]],
        num_bytes: int,
        buffers: Mapping[str, Tensor],
        state: WeightsState,
    ) -> None:
        """Copy this rank's share to host memory, then write it while training goes on.

        tensors: yields (kind, parameter name, full tensor) in the same order on every rank; must
        not change during the call. num_bytes: their size over all ranks. buffers: tensors that rank
        0 writes, by kind/name. If the copies do not fit into free host memory, this call writes the
        share file by file. It waits for an earlier save. One that fails is tried again with a
        back-off from the copies in memory, until the next call; without such copies, it is not.
        """
        self.wait()
        self._failure, self._give_up_s = "", math.inf
        pieces = self._pieces(tensors, buffers)
        document = json.dumps(state.to_json(), indent=1).encode()
        if not self._fits(step, num_bytes):
            self._write(step, _freed(pieces), document, again=False)
            return
        copies = list(pieces)
        self._thread = threading.Thread(
            target=lambda: self._write(step, copies, document, again=True), name=f"save-{step}"
        )
        self._thread.start()

    def go_back(self, step: int) -> Checkpoint | None:
        """Return the newest checkpoint of at most this step, None without one; remove later ones.

        Without the removal, a run that is killed afterwards would resume from a later one.
        """
        self.wait()
        self._ranks.barrier()
        found = latest_checkpoint(self._folder, self._ranks, step, self._outages.note)
        if found is not None:
            self.remove_after(found.step)
        return found

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after this step, because the run has gone back to it."""
        self.wait()
        self._ranks.barrier()
        if self._ranks.is_main:
            for later, path in checkpoints_in(self._folder).items():
                if later > step:
                    _remove(path)
        self._ranks.barrier()

    def wait(self, patience_s: float = 0.0) -> None:
        """Wait until no checkpoint is being written.

        patience_s: how long attempts to write one that could not be written go on.
        """
        if self._thread is not None:
            self._give_up_s = time.monotonic() + patience_s
            self._hurry.set()
            self._thread.join()
            self._thread = None
            self._hurry.clear()

    def finish(self, patience_s: float = 0.0) -> None:
        """Wait for the last save, for at most `patience_s` and one attempt if it has failed.

        Raises: OSError on every rank if it cannot be written.
        """
        self.wait(patience_s)
        failure = self._ranks.from_main(lambda: self._failure)
        if failure:
            raise OSError(f"{failure}; make room and start again: the checkpoint before is intact")

    def _fits(self, step: int, num_bytes: int) -> bool:
        """Return whether each rank's copies fit into the free memory of its host; collective."""
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
        """Yield this rank's share, one file's tensors at a time.

        Each tensor goes to the rank with the fewest bytes so far; every rank computes the whole
        split.
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

    def _write(
        self, step: int, pieces: Iterable[dict[str, Tensor]], state: bytes, *, again: bool
    ) -> None:
        """Write this rank's share; again: try until it is time to give up, which all ranks do."""
        delay_s = retry_delays()
        try:
            while self._attempt(step, pieces, state) and again:
                if self._thread_ranks.any(time.monotonic() >= self._give_up_s):
                    break
                left_s = self._give_up_s - time.monotonic()
                self._hurry.wait(min(delay_s(), max(left_s, 0)))
                self._hurry.clear()
        except RuntimeError as error:  # another rank has ended
            self._failed(step, error)

    def _attempt(self, step: int, pieces: Iterable[dict[str, Tensor]], state: bytes) -> bool:
        """Write all shares and commit them; return on every rank whether that failed; collective.

        Raises: RuntimeError if another rank has ended.
        """
        part = self._part(step)
        files: dict[str, Any] = {}
        failure: OSError | None = None
        if not self._folder.parent.is_dir():  # a disk that is away must not be written by its name
            failure = FileNotFoundError(errno.ENOENT, "the run folder is missing")
        for number, piece in enumerate(pieces):
            if failure is None:  # keep iterating: other ranks wait in the collectives of `pieces`
                name = f"rank_{self._ranks.rank:05d}_{number:03d}.safetensors"
                try:
                    write_tensors(part / name, piece)
                    files[name] = manifest_entry(part / name)
                except (OSError, SafetensorError) as error:  # a full disk gives a SafetensorError
                    failure = error if isinstance(error, OSError) else OSError(str(error))
        written = self._thread_ranks.gather((files, failure))
        failure = next((reason for _, reason in written if reason), None)
        whole = {name: entry for files, _ in written for name, entry in files.items()}
        if failure is None:
            failure = self._thread_ranks.from_main(lambda: self._committed(part, whole, state))
        if failure is None:
            self._failure = ""
            if self._ranks.is_main:
                self._outages.written(self._folder)
                self._tidy(step)
            return False
        self._failed(step, failure)
        return True

    def _part(self, step: int) -> Path:
        """Return the hidden folder of a checkpoint that is being written."""
        return self._folder / f".{step_name(step)}"

    def _failed(self, step: int, error: Exception) -> None:
        """Say that a checkpoint is not written, and make room."""
        self._failure = f"no checkpoint at step {step}: {error}"
        if self._ranks.is_main:
            shutil.rmtree(self._part(step), ignore_errors=True)
            more = f"no checkpoint at step {step} so far, the one before is intact; the run goes on"
            self._outages.failed(self._folder, error, more)

    def _committed(self, part: Path, files: dict[str, Any], state: bytes) -> OSError | None:
        """Commit a checkpoint whose shares are written; return the error if that fails."""
        try:
            self._commit(part, files, state)
        except OSError as error:
            return error
        return None

    def _commit(self, part: Path, files: dict[str, Any], state: bytes) -> None:
        for path in part.iterdir():  # an attempt before this one may have left something
            if path.name not in files:
                remove(path)
        write_atomic(part / STATE, state)
        files[STATE] = manifest_entry(part / STATE)
        manifest = encode_manifest({"version": FORMAT_VERSION, "files": files})
        write_atomic(part / MANIFEST, manifest)
        final = part.with_name(part.name.removeprefix("."))
        replace_folder(part, final)

    def _tidy(self, newest: int) -> None:
        """Remove the checkpoints that are not kept, and the damaged ones up to step `newest`."""
        try:
            present = checkpoints_in(self._folder)
            kept = self._retention.kept({step: _metrics(path) for step, path in present.items()})
            for step, path in present.items():
                if step not in kept and not is_pinned(path):
                    _remove(path)
            for step, path in steps_in(self._folder, DAMAGED).items():
                if step <= newest:
                    remove(path)
        except OSError as error:  # the new checkpoint counts, and the next save tidies up
            more = f"step {newest} is saved, but an old checkpoint stays"
            self._outages.failed(self._folder, error, more)


def _remove(path: Path) -> None:
    """Remove a checkpoint whole: a reader that comes now finds none, and no half of it."""
    hidden = path.with_name(f".{path.name}")
    replace_folder(path, hidden)
    remove(hidden)


def _freed(pieces: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the pieces, and free the memory of each one before the next is made."""
    for piece in pieces:
        yield piece
        piece.clear()


def _metrics(path: Path) -> dict[str, float]:
    """Return the numbers of the evaluation at a checkpoint; empty if they cannot be read."""
    try:
        state = parse_state(read_json(path / STATE, limit=MAX_STATE_BYTES, below=path))
    except (OSError, ValueError):
        return {}
    values = state.metrics if isinstance(state, RunState) else {}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
