"""Open the data sets of a config for this rank."""

from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.config import CaptionForm, CropPlace
from data.order.batches import Share
from data.shards.manifest import Ids
from data.streams.images import ImageStream
from data.streams.latents import LatentStream
from data.streams.rows import MAP_ARRAY
from data.streams.stream import IMAGES, NOTHING_DRAWN, Batch, Randomness, Stream
from models.conditioning.given import Captions, Draws, Given
from models.config.conditioning import CONDITIONERS, any_caption
from trainer.config import Config, Task
from trainer.runtime import rng
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import Purpose

CONDITION_ARRAYS = frozenset({IMAGES, MAP_ARRAY})
"""Arrays of a batch of latents that only conditions are made of."""
SHOWN = 5
"""Most labels in an error."""


def open_images(config: Config, ranks: Ranks, split: Literal["train", "val"]) -> ImageStream:
    """Open the image shards of a split: data.train with random choices, or data.val.

    Raises: FileNotFoundError or ValueError that names data.train or data.val, and the command that
    makes the shards.
    """
    randomness = _randomness(config) if split == "train" else NOTHING_DRAWN
    command = f"python -m trainer.pack +experiment={config.run.experiment}"
    stream = ImageStream.open(
        config.data, split, _share(config, ranks), randomness, command=command
    )
    if config.task is Task.diffusion:
        _check_captions(stream, config)
        _check_classes(stream, config)
    return stream


def open_latents(config: Config, ranks: Ranks) -> LatentStream:
    """Open the latent shards of data.latents or data.mixture.

    Raises: FileNotFoundError or ValueError that names the option, and the command that makes the
    shards.
    """
    command = f"python -m trainer.precompute +experiment={config.run.experiment}"
    stream = LatentStream.open(
        config.data, _share(config, ranks), _randomness(config), command=command
    )
    _check_captions(stream, config)
    _check_classes(stream, config)
    return stream


def given_by(batch: Batch, captions: Captions, draws: Draws | None = None) -> Given:
    """Return what the samples of a batch give for their condition.

    captions: [B], of the batch; None: the null condition. draws: for conditions that are random.
    """
    return Given(
        captions,
        images=batch.arrays.get(IMAGES),
        maps=batch.arrays.get(MAP_ARRAY),
        boxes=batch.boxes,
        draws=draws,
    )


def _check_captions(stream: Stream, config: Config) -> None:
    """Let a caption that has no condition, such as a wrong class number, cost its sample alone."""
    problem = CONDITIONERS[config.conditioner.kind].caption_problem
    if problem is not any_caption:
        stream.caption_problem = partial(problem, config.conditioner)


def _check_classes(stream: Stream, config: Config) -> None:
    """Check that a conditioner of label maps or boxes knows the classes of the data set.

    Raises: ValueError that names conditioner.num_classes or conditioner.classes.
    """
    reads = CONDITIONERS[config.conditioner.kind].reads
    classes, known = len(stream.manifest.map_classes), config.conditioner.num_classes
    if "maps" in reads and classes > known:
        raise ValueError(
            f"conditioner.num_classes={known}: the label maps of {stream.option} have {classes} "
            f"classes; set it to {classes}"
        )
    unknown = [
        repr(label)
        for label in stream.manifest.box_classes
        if label not in config.conditioner.classes
    ]
    if "boxes" in reads and unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            f"conditioner.classes lacks {', '.join(unknown[:SHOWN])}{more}, labels of boxes in "
            f"{stream.option}: set it to box_classes of the manifest there"
        )


def _share(config: Config, ranks: Ranks) -> Share:
    return Share(
        seed=config.run.seed,
        rank=ranks.rank,
        world=ranks.world_size,
        global_batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
    )


def _randomness(config: Config) -> Randomness:
    """Return the draws for flips, crops and captions, functions of (seed, epoch, sample)."""
    seed = config.run.seed

    def flip(epochs: Ids, samples: Ids) -> NDArray[np.bool_]:
        return rng.uniform(seed, Purpose.flip, epochs, samples) < 0.5

    def crop(epochs: Ids, samples: Ids) -> NDArray[np.float64]:
        smallest, largest = config.data.crop_sides
        draws = rng.uniforms(seed, Purpose.crop, epochs, samples, 3)
        draws[:, 0] = smallest + (largest - smallest) * draws[:, 0]
        return draws

    forms = [config.data.captions, *(item.captions for item in config.data.mixture)]
    several = any(form not in (None, CaptionForm.text) for form in forms)
    return Randomness(
        flip=flip if config.data.flip else None,
        crop=crop if config.data.crop is CropPlace.random else None,
        caption=partial(rng.uniform, seed, Purpose.caption) if several else None,
    )
