"""The data sets of a config, opened for this rank."""

from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.config import CaptionForm
from data.image_stream import ImageStream
from data.latent_stream import LatentStream
from trainer import rng
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.rng import Purpose


def open_images(config: Config, ranks: Ranks, split: Literal["train", "val"]) -> ImageStream:
    """The image shards of a split.

    Raises: FileNotFoundError or ValueError that names data.train or data.val and what makes it.
    """
    return ImageStream(
        config.data.train if split == "train" else config.data.val,
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=ranks.rank,
        world=ranks.world_size,
        flips=_flips(config) if split == "train" else None,
        draws=_caption_draws(config) if split == "train" else None,
        command=f"python -m trainer.pack +experiment={config.run.experiment}",
    )


def open_latents(config: Config, ranks: Ranks) -> LatentStream:
    """The latent shards.

    Raises: FileNotFoundError or ValueError that names data.latents and what makes it.
    """
    return LatentStream(
        config.data.latents,
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=ranks.rank,
        world=ranks.world_size,
        flips=_flips(config),
        draws=_caption_draws(config),
        command=f"python -m trainer.precompute +experiment={config.run.experiment}",
    )


def _flips(config: Config):
    if not config.data.flip:
        return None
    seed = config.run.seed

    def flips(epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        return rng.uniform(seed, Purpose.flip, epochs, samples) < 0.5

    return flips


def _caption_draws(config: Config):
    if config.data.captions is CaptionForm.text:
        return None
    return partial(rng.uniform, config.run.seed, Purpose.caption)
