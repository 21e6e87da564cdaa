"""Conditions from files: pictures, holes and label maps of any size, and layouts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data.shards.annotations import Box, decode_boxes
from data.shards.codecs import MAX_IMAGE_BYTES, BadSampleError, decode_image, decode_plain
from data.storage.untrusted import read_file
from data.text import printable
from models.conditioning.conditioner import Size
from models.conditioning.given import Given
from models.config import ConditionerKind
from trainer.config import Config, SampleConfig

Content = TypeVar("Content")
FILES = {
    ConditionerKind.super_resolution: ("images",),
    ConditionerKind.inpainting: ("images", "masks"),
    ConditionerKind.semantic_map: ("maps",),
    ConditionerKind.layout: ("boxes",),
}
"""Options of `sample` with the files of a kind of condition."""


@dataclass(frozen=True, slots=True)
class FileCondition:
    """The condition of one image, padded to a size that the U-Net can halve."""

    given: Given
    """Of one sample."""
    padded: Size
    """[pixels] (H, W) of the image to draw."""
    size: Size
    """[pixels] (H, W) of it without the padding."""
    name: str
    """Name of the file, for titles."""

    def cut(self, image: Tensor) -> Tensor:
        """Cut the padding from an image [3, H, W], of the padded size or made smaller."""
        rows = round(image.shape[1] * self.size[0] / self.padded[0])
        return image[:, :rows, : round(image.shape[2] * self.size[1] / self.padded[1])]


def check_files(config: Config) -> None:
    """Check that the options name files of the model's kind of condition, and of no other.

    Raises: ValueError that names the option.
    """
    kind, wanted = config.conditioner.kind, FILES.get(config.conditioner.kind, ())
    unread = ["prompts", "prompts_file", "init_image"] if wanted else []
    if wanted and kind is not ConditionerKind.layout:  # boxes have no size in pixels
        unread += ["height", "width"]
    for name in unread:
        if getattr(config.sample, name):
            raise ValueError(
                f"sample.{name} is not read: conditioner.kind={kind} draws from "
                f"{' and '.join(f'sample.{option}' for option in wanted)}"
            )
    counts = {name: len(_paths(config.sample, name)) for names in FILES.values() for name in names}
    for name, count in counts.items():
        if count and name not in wanted:
            raise ValueError(f"sample.{name} is not read: this model has conditioner.kind={kind}")
    if wanted and not any(counts[name] for name in wanted):
        raise ValueError(
            f"no conditions: conditioner.kind={kind} needs the paths of files in "
            f"{' and '.join(f'sample.{option}' for option in wanted)}"
        )
    if len({counts[name] for name in wanted}) > 1:
        both = " but ".join(f"sample.{name} names {counts[name]} files" for name in wanted)
        raise ValueError(f"{both}: each picture needs one")


def read_conditions(config: Config) -> list[FileCondition]:
    """Read the conditions that sample.images, sample.masks, sample.maps or sample.boxes name.

    Raises: ValueError that names the option and a file that cannot be read.
    """
    kind, own = config.conditioner.kind, config.sample
    halvings = 2 ** (len(config.unet.block_out_channels) - 1)
    factor = config.autoencoder.downsample_factor
    found = list[FileCondition]()
    if kind is ConditionerKind.semantic_map:
        for path in own.maps:
            labels = _labels(path, config.conditioner.num_classes)
            size = labels.shape[0], labels.shape[1]
            padded = _padded(torch.tensor(labels)[None, None].float(), factor * halvings)
            given = Given([""], maps=padded[:, 0].byte())
            found.append(_condition(path, given, padded, size))
    elif kind is ConditionerKind.super_resolution:
        for path in own.images:
            small = _picture(path, "images")
            size = small.shape[2] * factor, small.shape[3] * factor
            padded = _padded(small, halvings)
            given = Given([""], small=padded)
            found.append(_condition(path, given, padded, size, factor))
    elif kind is ConditionerKind.inpainting:
        for path, mask in zip(own.images, own.masks, strict=True):
            image, hole = _picture(path, "images"), _hole(mask)
            if image.shape[2:] != hole.shape[2:]:
                (height, width), (h, w) = hole.shape[2:], image.shape[2:]
                raise ValueError(
                    f"sample.masks: {mask} has {width}x{height} pixels, its picture {w}x{h}"
                )
            size = image.shape[2], image.shape[3]
            padded = _padded(image, factor * halvings)
            given = Given([""], images=padded, masks=_padded(hole, factor * halvings))
            found.append(_condition(path, given, padded, size))
    elif kind is ConditionerKind.layout:
        size = own.height or config.data.image_size, own.width or config.data.image_size
        for path in own.boxes:
            given = Given([""], boxes=[_boxes(path, config.conditioner.classes)])
            found.append(FileCondition(given, size, size, Path(path).name))
    return found


def joined(conditions: Sequence[FileCondition]) -> Given:
    """Return the conditions of B samples, all of one size, as one."""
    parts = [condition.given for condition in conditions]

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    return Given(
        [caption for part in parts for caption in part.captions],
        images=stacked("images"),
        maps=stacked("maps"),
        boxes=[boxes for part in parts for boxes in part.boxes],
        small=stacked("small"),
        masks=stacked("masks"),
    )


def same_sizes(numbers: Sequence[int], conditions: Sequence[FileCondition]) -> Iterator[list[int]]:
    """Split the numbers of samples into runs whose conditions have one size.

    Sample i has condition number i modulo their number.
    """
    sizes = [conditions[number % len(conditions)].size for number in numbers]
    for _, run in groupby(zip(sizes, numbers, strict=True), key=itemgetter(0)):
        yield [number for _, number in run]


def _condition(
    path: str, given: Given, padded: Tensor, size: Size, factor: int = 1
) -> FileCondition:
    """factor: side of the image by that of `padded`."""
    height, width = padded.shape[-2:]
    return FileCondition(given, (height * factor, width * factor), size, Path(path).name)


def _paths(options: SampleConfig, name: str) -> Sequence[str]:
    return getattr(options, name)


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    """Pad [1, C, H, W] at the right and at the bottom with its last pixels, to a multiple."""
    height, width = pixels.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return F.pad(pixels, padding, mode="replicate")


def _picture(path: str, option: str) -> Tensor:
    """Read a picture: [1, 3, H, W] in [-1, 1]."""
    image = _read(path, option, decode_image)
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _hole(path: str) -> Tensor:
    """Read a hole: [1, 1, H, W], 1 where the picture is brighter than half."""
    image = np.asarray(_read(path, "masks", decode_image).convert("L"))
    hole = torch.tensor(image > 127)[None, None].float()
    if not hole.any():
        raise ValueError(f"sample.masks: {path} is black: it has no hole to fill")
    return hole


def _labels(path: str, classes: int) -> NDArray[np.uint8]:
    """Read a label map [H, W]."""
    image = _read(path, "maps", lambda content: decode_plain(content, "L", "P"))
    labels = np.asarray(image, np.uint8)
    if (most := int(labels.max())) >= classes:
        raise ValueError(
            f"sample.maps: {path} has the class {most}, but the model knows 0 to {classes - 1}"
        )
    return labels


def _boxes(path: str, classes: Sequence[str]) -> list[Box]:
    """Read a layout, whose labels are all in `classes`."""
    boxes = _read(path, "boxes", decode_boxes)
    for box in boxes:
        if box.label not in classes:
            near = get_close_matches(box.label, classes, n=1, cutoff=0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"sample.boxes: {path} has the label {printable(box.label)!r}, which is not in "
                f"conditioner.classes{hint}"
            )
    return boxes


def _read(path: str, option: str, decode: Callable[[bytes], Content]) -> Content:
    try:
        return decode(read_file(Path(path), limit=MAX_IMAGE_BYTES))
    except OSError as error:
        raise ValueError(f"sample.{option}: {error}") from error
    except BadSampleError as error:
        raise ValueError(f"sample.{option}: {path}: {error}") from error
