"""Latents as batches, of one data set or of a mixture."""

import hashlib
import json
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from data.buffers import Buffers
from data.captions import choose_caption
from data.codecs import BadSampleError, decode_npy
from data.config import CaptionForm, DataConfig
from data.manifest import Kind, Manifest, ManifestError
from data.mixture import MixturePlan, join_latents, share_lanes
from data.plan import LanePlan
from data.stored import ArrayLayout, StoredBatch
from data.stream import Rows, Stream, Visits, shard_sizes


class LatentStream(Stream):
    """Latents made by trainer.precompute: a thread that gathers from mapped shards is enough."""

    kind = Kind.latents

    def __init__(self, dataset_dir: str, data_config: DataConfig, **options: Any) -> None:
        super().__init__(dataset_dir, data_config, **options)
        if self.manifest.latents is None:
            raise ManifestError(
                f"{self.option}: the manifest in {dataset_dir} describes no latents"
            )
        self._latents = self.manifest.latents
        self._layouts = {"moments": ArrayLayout.of(np.float16, (2, *self._latents.shape))}
        if options.get("flips") is not None and not self._latents.flip:
            raise ValueError(
                f"data.flip: {dataset_dir} has no mirrored latents; set data.flip=false, or "
                f"delete them and run `{self.command}` again"
            )
        if data_config.store_text and not self._latents.text:
            raise ValueError(
                f"data.store_text: {dataset_dir} has no text embeddings; set data.store_text=false,"
                f" or delete it and run `{self.command}` again"
            )
        if data_config.store_text:
            self._layouts["text"] = self._text_layout()
        self._buffers = {
            name: Buffers((self._micro_batch, *layout.shape), layout.dtype)
            for name, layout in self._layouts.items()
        }

    @cached_property
    def plan(self) -> LanePlan | MixturePlan:
        """The order of samples; of those of data.mixture, if it names any."""
        if not self._sets:
            return LanePlan(shard_sizes(self.manifest), **self._order())
        return MixturePlan(list(map(shard_sizes, self._sets)), self._weights, **self._order())

    @property
    def identity(self) -> str:
        """What the samples and their numbers are, as a hash."""
        lanes = share_lanes(self._weights, self.config.lanes).tolist() if self._sets else []
        text = json.dumps([self.manifest.hash, lanes])
        return hashlib.sha256(text.encode()).hexdigest() if lanes else self.manifest.hash

    def _load(self, folder: str) -> tuple[str, Manifest]:
        folders = [item.latents for item in self.config.mixture]
        self._weights = [item.weight for item in self.config.mixture]
        self._sets = [
            self._load_manifest(folder, f"data.mixture[{number}].latents")
            for number, folder in enumerate(folders)
        ]
        if not self._sets:
            return super()._load(folder)
        self.option = "data.mixture"
        return join_latents(folders, self._sets, self._weights)

    def _text_layout(self) -> ArrayLayout:
        """Take the shape of the text encoder's output from the first sample that can be read."""
        for number in range(self.num_samples):
            (stored,) = self.reader.find(np.array([number]))
            with suppress(BadSampleError):
                text = decode_npy(stored.payload("text.npy"))
                if text.dtype == np.float16 and text.ndim == 2:
                    return ArrayLayout.of(text.dtype, text.shape)
        raise ValueError(f"{self.option}: no sample has text embeddings [T, D] of float16")

    def _captions(self, samples: StoredBatch, draws: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return captions, of meaning only where the second, [B] bool, says so."""
        if self.config.captions is CaptionForm.text:
            return samples.texts(samples.members("txt", "cls"))
        captions, sound = [""] * len(samples), np.zeros(len(samples), bool)
        for row, (stored, draw) in enumerate(zip(samples, draws.tolist(), strict=True)):
            with suppress(BadSampleError):
                captions[row] = choose_caption(stored.member, self.config.captions, draw)
                sound[row] = True
        return captions, sound

    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        """Read all at once, then one by one those that are unlike the others."""
        flip = visits.flip
        arrays, sound = {}, np.ones(len(samples), bool)
        for name, layout in self._layouts.items():
            members = samples.members(f"{name}.npy")
            if name == "moments" and flip.any():
                members[flip] = samples.members("flip.moments.npy")[flip]
            arrays[name] = self._buffers[name].take(len(samples))
            sound &= samples.copy(members, layout, arrays[name])
        # after the arrays, as captions lie right behind them and are on their way to the processor
        captions, readable = self._captions(samples, visits.draw)
        sound &= readable
        rows = Rows(keys=samples.keys(), captions=captions, arrays=arrays, bad={})
        for row in np.flatnonzero(~sound).tolist():
            stored = samples[row]
            try:
                for name, layout in self._layouts.items():
                    prefix = "flip." if name == "moments" and flip[row] else ""
                    array = decode_npy(stored.payload(f"{prefix}{name}.npy"))
                    if (array.dtype, array.shape) != (layout.dtype, layout.shape):
                        raise BadSampleError(f"{name} of {array.dtype} {array.shape}")
                    rows.arrays[name][row] = array
                captions[row] = choose_caption(
                    stored.member, self.config.captions, visits.draw[row]
                )
            except BadSampleError as error:
                rows.reject(row, stored, error)
        return rows
