"""The conditions of evaluated samples, and the CLIP embeddings of their prompts."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.streams.images import ImageStream
from models.conditioning.clip import Clip
from models.conditioning.given import Given
from models.config.conditioning import CONDITIONERS
from trainer.config import Config
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.progress import Stopping
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import ConditionDraws, Purpose
from trainer.streams import given_by


class Prompts:
    """Captions of images, chosen at random by eval.seed, and what else their condition is made of.

    Conditions that are made of images, label maps or boxes come from other images than the
    training's where there are some: a network could know its training images by heart.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        images: ImageStream,
        parts: Sequence[range],
        clip: Clip | None,
    ) -> None:
        """parts: numbers of this rank's samples in each batch. clip: None: no embeddings."""
        self._config, self._ranks, self.images = config.eval, ranks, images
        self.parts, self._clip = parts, clip
        self.are_paired = bool(CONDITIONERS[config.conditioner.kind].reads)
        """Whether each sample has an image that it should be like."""
        self._embeddings: list[Tensor] = []

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        """The image of each sample; they repeat if there are more samples than images."""
        seed, total = self._config.seed, self.images.num_samples
        wanted = self._config.num_samples
        order = rng.chosen(seed, Purpose.choice, 0, 0, total, min(wanted, total))
        return np.resize(order, wanted)

    @cached_property
    def texts(self) -> list[str]:
        """The prompts of all samples."""
        return self.images.captions(self._numbers)

    def given(self, samples: Sequence[int]) -> Given:
        """Return what the condition of these samples is made of, [B] numbers of samples.

        Raises: ValueError where an image cannot be read.
        """
        captions = [self.texts[number] for number in samples]
        if not self.are_paired:
            return Given(captions)
        numbers = self._numbers[list(samples)]
        batch = self.images.read(numbers)
        if len(batch.index) < len(numbers):
            lost = sorted({*numbers.tolist()} - {*batch.index.tolist()})
            raise ValueError(f"{self.images.option}: sample {lost[0]} is damaged: pack it again")
        ids = np.asarray(samples, np.int64)
        draws = ConditionDraws(self._config.seed, np.zeros_like(ids), ids)
        return given_by(batch, captions, draws)

    def embeddings(self, stopping: Stopping) -> list[Tensor] | None:
        """Embed this rank's prompts at the first call; collective.

        stopping: called between batches.
        Returns [B, D] float32 on the CPU for each batch; an empty list without a CLIP; None if
        asked to stop.
        """
        if self._clip is None:
            return self._embeddings
        found: list[Tensor] = []
        device, model = self._ranks.device, self._clip.model
        with on_device([model], device), torch.inference_mode():
            for part in self.parts:
                if stopping("embedding prompts"):
                    return None
                texts = [self.texts[number] for number in part]
                tokens = self._clip.tokenizer(texts or [""]).to(device)
                found.append(model.encode_text(tokens)[: len(part)].float().cpu())
        self._embeddings = found
        self._clip = None  # free the memory of its text tower
        return found
