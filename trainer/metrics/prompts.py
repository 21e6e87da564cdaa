"""The prompts of evaluated samples, and their CLIP embeddings."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.streams.images import ImageStream
from models.conditioning.clip import Clip
from trainer.config import EvalConfig
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.progress import Stopping
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import Purpose


class Prompts:
    """Captions of training images, chosen at random by eval.seed."""

    def __init__(
        self,
        config: EvalConfig,
        ranks: Ranks,
        images: ImageStream,
        parts: Sequence[range],
        clip: Clip | None,
    ) -> None:
        """parts: numbers of this rank's samples in each batch. clip: None: no embeddings."""
        self._config, self._ranks, self._images = config, ranks, images
        self.parts, self._clip = parts, clip
        self._embeddings: list[Tensor] = []

    @cached_property
    def texts(self) -> list[str]:
        """The prompts of all samples; captions repeat if there are more samples than images."""
        seed, total = self._config.seed, self._images.num_samples
        wanted = self._config.num_samples
        order = rng.chosen(seed, Purpose.choice, 0, 0, total, min(wanted, total))
        return self._images.captions(np.resize(order, wanted))

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
