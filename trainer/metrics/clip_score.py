"""CLIP score: how well images match their prompts, beside how well they match other prompts."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class ContrastiveModel(Protocol):
    """What open_clip's models do."""

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """image: [B, 3, S, S]; returns [B, width]."""
        ...

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text: [B, tokens] int64; returns [B, width]."""
        ...


class ClipScore:
    """Cosine similarity of images and prompts (Hessel et al. 2021, equation 1, without its 2.5).

    The shuffled score is the mean over all pairs of an image and another image's prompt: what
    every derangement gives on average, whatever the order of the samples or the number of ranks.
    A model that ignores its prompts scores no better than shuffled.
    """

    def __init__(
        self,
        clip: ContrastiveModel,
        tokenizer: Callable[[list[str]], Tensor],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> None:
        """clip is in eval mode and on device; mean and std are of RGB in [0, 1]."""
        self._clip, self._tokenizer, self._image_size = clip, tokenizer, image_size
        self._device = torch.device(device)
        self._mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(std, device=device).view(3, 1, 1)
        width = self._embed_texts([""]).shape[1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count, self._cosine, self._cosine_squared = zeros(), zeros(), zeros()
        self._image_sum, self._text_sum = zeros(width), zeros(width)

    def update(self, images: Tensor, prompts: list[str]) -> None:
        """Adds samples; images: [B, 3, H, W] uint8, each drawn from its prompt.

        Raises ValueError where their numbers differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot match {len(prompts)} prompts")
        image = self._embed_images(images).double()
        text = self._embed_texts(prompts).double()
        cosine = (image * text).sum(1)
        self._count += len(cosine)
        self._cosine += cosine.sum()
        self._cosine_squared += cosine.square().sum()
        self._image_sum += image.sum(0)
        self._text_sum += text.sum(0)

    def state(self) -> dict[str, Tensor]:
        """The live float64 sums: all-reducing them in place with SUM merges ranks."""
        return {
            "count": self._count,
            "cosine": self._cosine,
            "cosine_squared": self._cosine_squared,
            "image_sum": self._image_sum,
            "text_sum": self._text_sum,
        }

    def compute(self) -> dict[str, float]:
        """clip_score, its standard error, and clip_score_shuffled: cosines in [-1, 1].

        Raises ValueError for fewer than two samples.
        """
        n = float(self._count)
        if n < 2:
            raise ValueError(f"a CLIP score needs two samples or more, not {n:.0f}")
        total = float(self._cosine)
        variance = max(float(self._cosine_squared) - total**2 / n, 0.0) / (n - 1)
        others = float(self._image_sum @ self._text_sum) - total
        return {
            "clip_score": total / n,
            "clip_score_stderr": (variance / n) ** 0.5,
            "clip_score_shuffled": others / (n * (n - 1)),
        }

    @torch.inference_mode()
    def _embed_images(self, images: Tensor) -> Tensor:
        size = (self._image_size, self._image_size)
        pixels = images.to(self._device).float()
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp_(0, 255) / 255
        return self._clip.encode_image((pixels - self._mean) / self._std, normalize=True)

    @torch.inference_mode()
    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(prompts).to(self._device)
        return self._clip.encode_text(tokens, normalize=True)
