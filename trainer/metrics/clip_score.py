"""CLIP score: similarity of images and their prompts, and of images and other prompts."""

import torch
from torch import Tensor
from torch.nn import functional as F


class ClipScore:
    """Mean cosine similarity of CLIP's embeddings of images and of their prompts.

    CLIP-S of Hessel et al. 2021 (section 3), without its factor w = 2.5 and its clipping at 0.
    The shuffled score is the mean over all pairs of an image and the prompt of another image. It
    is the expected score of a model that ignores its prompts. It does not depend on the order of
    samples or on the number of ranks.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """width: size D of CLIP's embeddings. device: of the sums."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count, self._cosine, self._cosine_squared = zeros(), zeros(), zeros()
        self._image_sum, self._text_sum = zeros(width), zeros(width)

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Add CLIP's embeddings of a batch; they need no normalisation.

        images, texts: [B, D], any float type; row i of both belongs to sample i.
        Raises: ValueError if the numbers of rows differ.
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
        """Return the float64 sums themselves, no copies: a sum over ranks in place merges ranks."""
        return {
            "count": self._count,
            "cosine": self._cosine,
            "cosine_squared": self._cosine_squared,
            "image_sum": self._image_sum,
            "text_sum": self._text_sum,
        }

    def compute(self) -> dict[str, float]:
        """Return clip_score, clip_score_stderr and clip_score_shuffled: cosines in [-1, 1].

        clip_score_stderr is the standard error of the mean over samples.
        Raises: ValueError for fewer than two samples.
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
