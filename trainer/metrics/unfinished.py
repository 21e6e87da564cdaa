"""An unfinished reference: the features so far; the next start continues from them.

    references/inception-0f1e2d3c4b5a.unfinished/
        rows_0_4096.safetensors      features of images 0 … 4095, if they are kept
        rows_4096_6144.safetensors
        moments.safetensors          of images 0 … 6143; its metadata lists the files above

Images are numbered in the order of reading. Each file is written whole or not at all, and
moments.safetensors last; therefore a process may be killed at any time.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.storage.atomic import write_atomic
from data.storage.documents import parse_json
from data.storage.untrusted import read_file
from trainer.metrics.feature_set import FeatureCollector, FeatureSet
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.moments import GaussianMoments
from trainer.metrics.reference import MAX_BYTES, ReferenceSource, save_reference
from trainer.runs.outages import Outages
from trainer.runtime.ranks import Ranks

STATE = "moments.safetensors"


class UnfinishedReference:
    """The unfinished reference of one extractor; collective, except `save`."""

    def __init__(
        self,
        folder: Path,
        source: ReferenceSource,
        extractor: FeatureExtractor,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        """folder: eval.references. batch_size: images in a batch, which must not change."""
        self._references, self._source, self._ranks = folder, source, ranks
        self._folder = source.path(folder).with_suffix(".unfinished")
        self._batch_size = batch_size
        self.extractor = extractor
        self.done = 0
        """Number of images collected: a multiple of batch_size, or all."""
        self._outages = Outages()
        self._saved = 0
        self._rows_saved = 0
        self._files: dict[str, str] = {}
        self._collector = FeatureCollector(extractor, ranks, keeps_rows=True)

    def resume(self) -> None:
        """Continue from saved features, if they are complete and of the same batches."""
        found = self._load() if self._ranks.is_main else None
        self.done = self._saved = self._ranks.from_main(lambda: self._saved)
        if found is not None:
            self._collector = FeatureCollector(
                self.extractor, self._ranks, keeps_rows=True, start=found
            )
            self._rows_saved = len(self._collector.rows)

    def update(self, part: range, end: int, images: Tensor | None, kept: Tensor | None) -> None:
        """Collect a round, unless it was collected before.

        part: numbers of this rank's images. end: number of the first image of the next round.
        images: [B, 3, H, W] uint8; kept: [B] bool; see `FeatureCollector.update`.
        """
        if end <= self.done:
            return
        is_new = part.start >= self.done
        self._collector.update(images if is_new else None, kept)
        self.done = end

    def save(self) -> None:
        """Save the collected features, on rank 0; a disk that fails costs only the work so far."""
        if not self._ranks.is_main or self.done == self._saved:
            return
        try:
            self._save()
        except OSError as error:
            self._outages.failed(self._folder, error, "going on, with the features in memory")
        else:
            self._outages.written(self._folder)

    def _save(self) -> None:
        rows = self._collector.rows[self._rows_saved :]
        if rows:
            content = save({"rows": torch.cat(rows)})
            name = f"rows_{self._saved}_{self.done}.safetensors"
            write_atomic(self._folder / name, content)
            self._files[name] = hashlib.sha256(content).hexdigest()
        moments = self._collector.moments()
        about = {
            "done": self.done,
            "batch_size": self._batch_size,
            "files": self._files,
            "sha256": hashlib.sha256(save(moments)).hexdigest(),
        }
        write_atomic(self._folder / STATE, save(moments, {"unfinished": json.dumps(about)}))
        self._saved, self._rows_saved = self.done, len(self._collector.rows)

    def finish(self) -> FeatureSet | None:
        """Write the reference and delete the unfinished one; return it on rank 0.

        A disk that fails costs the file alone: an evaluation has all that it needs in memory.
        """
        if not self._ranks.is_main:
            return None
        found = self._collector.finish()
        try:
            path = save_reference(self._references, self._source, found)
        except OSError as error:
            more = "going on, with the reference in memory; another start makes it again"
            self._outages.failed(self._references, error, more)
            return found
        shutil.rmtree(self._folder, ignore_errors=True)
        print(f"reference: {path}", flush=True)
        return found

    def _load(self) -> FeatureSet | None:
        """Read the saved features; None if there are none, or none that can be used."""
        path = self._folder / STATE
        if not path.is_file():
            return None
        try:
            content = read_file(path, limit=MAX_BYTES, below=self._folder)
            about = parse_json(_metadata(content)["unfinished"])
            if about["batch_size"] != self._batch_size:
                return None
            state = load(content)
            if hashlib.sha256(save(state)).hexdigest() != about["sha256"]:
                raise ValueError("its moments are not those that were saved")
            moments = GaussianMoments.from_state(state)
            parts = [self._rows(name, digest) for name, digest in about["files"].items()]
            done = int(about["done"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            print(f"{self._folder} is damaged and made anew: {error}", flush=True)
            return None
        self._saved, self._files = done, dict(about["files"])
        width = self.extractor.num_features
        return FeatureSet(moments, torch.cat([torch.zeros(0, width), *parts]))

    def _rows(self, name: str, digest: str) -> Tensor:
        path = self._folder / Path(name).name
        content = read_file(path, limit=MAX_BYTES, below=self._folder)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name} is not the file that {STATE} lists")
        return load(content)["rows"]


def _metadata(content: bytes) -> dict[str, str]:
    """Return the text metadata in the header of a safetensors file."""
    header_bytes = int.from_bytes(content[:8], "little")
    return parse_json(content[8 : 8 + header_bytes])["__metadata__"]
