"""CLIP score: how well images match their prompts, beside how well they match other prompts."""

import torch
from torch import Tensor
from torch.nn import functional as F


class ClipScore:
    """Cosine similarity of images and prompts (Hessel et al. 2021, equation 1, without its 2.5).

    The shuffled score is the mean over all pairs of an image and another image's prompt: what
    every derangement gives on average, whatever the order of the samples or the number of ranks.
    A model that ignores its prompts scores no better than shuffled.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """width: of CLIP's embeddings."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count, self._cosine, self._cosine_squared = zeros(), zeros(), zeros()
        self._image_sum, self._text_sum = zeros(width), zeros(width)

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Adds CLIP's embeddings of samples and of their prompts, of any length: both [B, width].

        Raises ValueError where their numbers differ.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images cannot match {len(texts)} prompts")
        image = F.normalize(images.to(self._image_sum), dim=1)
        text = F.normalize(texts.to(self._text_sum), dim=1)
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
