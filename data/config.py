"""Options of the data plane, on one page and without torch or numpy."""

from dataclasses import dataclass, field
from enum import StrEnum


class SourceKind(StrEnum):
    """Where raw images and captions come from."""

    openmoji = "openmoji"
    folder = "folder"
    webdataset = "webdataset"


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """The raw data that `trainer.pack` turns into shards."""

    kind: SourceKind = SourceKind.folder
    path: str = ""
    """folder: images with captions beside them; webdataset: folders of tars and brace patterns,
    joined by `::`."""
    require_captions: bool = True
    """folder: leave out images without a caption; an unconditional model needs none."""
    shard_samples: int = 10_000
    """Samples a shard."""
    val_share: float = 0.0
    """Share of the concepts (folder: samples, webdataset: tars) kept for validation, by hash."""
    skin_tone_share: float = 1.0
    """openmoji: share of the skin-tone variants kept, chosen by hash."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which data sets a run reads, and in what order."""

    dir: str
    """Folder of this experiment's data sets."""
    train: str = "${.dir}/train"
    """Image shards to train on."""
    val: str = "${.dir}/val"
    """Image shards never trained on."""
    latents: str = "${.dir}/latents"
    """Latent shards that `trainer.precompute` makes from `train`."""
    image_size: int
    """Side of the square image in pixels: short side resized, centre cropped."""
    flip: bool = False
    """Flip images left to right for half of the visits; stored latents need the flip variant."""
    store_text: bool = False
    """Whether latent shards carry the text encoder's output; else it runs while training."""
    lanes: int = 1
    """Independent sequences that the plan interleaves; divides train.global_batch_size."""
    shuffle_block: int = 4096
    """Samples shuffled together within a lane."""
    workers: int = 0
    """Processes that decode images; latents need none."""
    prefetch: int = 4
    """Micro batches read ahead."""
    max_rejected_share: float = 0.01
    """Precompute and training stop when more than this share of the samples is bad."""
    source: SourceConfig = field(default_factory=SourceConfig)
