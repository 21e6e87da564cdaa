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
    """folder: images with captions beside them; webdataset: folders of tars (img2dataset's, too),
    brace patterns, joined by `::`. Paths or URLs."""
    require_captions: bool = True
    """folder: leave out images without a caption; an unconditional model needs none."""
    shard_samples: int = 10_000
    """Samples a shard."""
    val_share: float = 0.0
    """Share of the concepts (folder: samples, webdataset: tars) kept for validation, by hash."""
    skin_tone_share: float = 1.0
    """openmoji: share of the skin-tone variants kept, chosen by hash."""
    workers: int = 4
    """webdataset: tars indexed at the same time."""


class Missing(StrEnum):
    """What a filter does with a sample that lacks its field."""

    drop = "drop"
    keep = "keep"


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """A rule on one field of a sample's metadata; a sample stays if every rule keeps it."""

    name: str
    """A field of the sample's JSON or of the parquet beside its tar; or, derived from the sample:
    width, height, aspect (long side by short side), caption_length (characters)."""
    min: float | None = None
    """Smallest number kept."""
    max: float | None = None
    """Largest number kept."""
    allowed: list[str] = field(default_factory=list)
    """Strings kept; empty: any."""
    missing: Missing = Missing.drop


class CaptionForm(StrEnum):
    """Where the captions of a sample are."""

    text = "text"
    lines = "lines"
    json = "json"


@dataclass(slots=True, kw_only=True)
class MixtureConfig:
    """One of several sets of latents that share every batch."""

    latents: str
    """Latent shards that `trainer.precompute` made."""
    weight: float
    """Share of every batch, relative to the other sets."""


@dataclass(slots=True, kw_only=True)
class CacheConfig:
    """Where shards of a remote data set are kept while they are needed: once a node."""

    dir: str = ""
    """A folder on a local disk; empty: `latent-foundry-UID` in the system's temporary folder."""
    max_gib: float = 64.0
    """Bound of what the folder holds, in GiB."""


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
    mixture: list[MixtureConfig] = field(default_factory=list)
    """Sets of latents to train on together, instead of `latents`."""
    image_size: int
    """Side of the square image in pixels: short side resized, centre cropped."""
    flip: bool = False
    """Flip images left to right for half of the visits; stored latents need the flip variant."""
    captions: CaptionForm = CaptionForm.text
    """text: the .txt, or the class in .cls; lines: each line of the .txt is one; json: the list
    `captions` in the .json. Of several, every visit in training draws one; elsewhere it is the
    first."""
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
    filters: list[FilterConfig] = field(default_factory=list)
    """Rules by which `trainer.pack` leaves samples out."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
