"""Conditioners: what the U-Net attends to, made from captions or class numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.clip import load_clip
from models.config import ConditionerConfig, ConditionerKind
from models.weights import hash_network

Captions = Sequence[str | None]
"""What samples are conditioned on; None is no condition."""


class Conditioner(nn.Module):
    """Captions to the U-Net's context.

    context_dim: width of a context token, 0 where there is no context. trainable: whether its
    parameters are trained with the U-Net.
    """

    context_dim: int
    trainable: bool

    def forward(self, captions: Captions) -> Tensor | None:
        """B captions → context [B, T, context_dim] float32, on the conditioner's device."""
        raise NotImplementedError


class NoConditioner(Conditioner):
    """No context at all, for an unconditional U-Net."""

    context_dim = 0
    trainable = False

    def forward(self, captions: Captions) -> None:
        """See the base class."""
        return None


class ClassLabel(Conditioner):
    """One learned token a class; captions are class numbers as decimal strings.

    Rombach et al. 2022, section 4.3.1. The last token, `num_classes`, is the null class.
    """

    trainable = True

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"conditioner.num_classes = {num_classes}: set it to the data set's classes"
            )
        self.num_classes = num_classes
        self.context_dim = width
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, captions: Captions) -> Tensor:
        """See the base class; T = 1. Raises ValueError for a caption that is no class number."""
        classes = [self._class_number(caption) for caption in captions]
        indices = torch.tensor(classes, device=self.embedding.weight.device)
        return self.embedding(indices)[:, None].float()

    def _class_number(self, caption: str | None) -> int:
        if caption is None:
            return self.num_classes
        text = caption.strip()
        if not text.isdecimal() or int(text) >= self.num_classes:
            raise ValueError(
                f"caption {caption[:40]!r} is no class number from 0 to {self.num_classes - 1}: "
                f"correct the captions, conditioner.num_classes or conditioner.kind"
            )
        return int(text)


class Text(Conditioner):
    """The tokens of a frozen CLIP text tower (Rombach et al. 2022, section 3.3)."""

    trainable = False
    null_context: Tensor

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        clip = load_clip(config)
        if clip.text_width != config.width:
            raise ValueError(
                f"conditioner.width = {config.width}, but the text tower of {config.model} is "
                f"{clip.text_width} wide: set conditioner.width and unet.context_dim to that"
            )
        self.context_dim = config.width
        self.penultimate = config.penultimate
        self.architecture = clip.text_architecture
        self.tokenizer = clip.tokenizer
        self.clip: Any = clip.model
        del self.clip.visual

    def train(self, mode: bool = True) -> "Text":
        """Stay in evaluation mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: Captions) -> Tensor:
        """See the base class; T is the tower's context length, longer captions are cut.

        The empty caption stands for no condition.
        """
        ids = self.tokenizer([caption or "" for caption in captions]).to(
            self.clip.logit_scale.device
        )
        states = self.clip.forward_intermediates(
            text=ids,
            text_indices=2 if self.penultimate else 1,
            normalize_intermediates=True,
            intermediates_only=True,
        )
        return states["text_intermediates"][0].float()


def fingerprint(text: Text) -> str:
    """Identity of a text encoder: SHA-256, in hex, of its options and its weights as fp32."""
    return hash_network(text, {**text.architecture, "penultimate": text.penultimate})


def build_conditioner(config: ConditionerConfig) -> Conditioner:
    """The conditioner that the options describe.

    Raises ValueError or FileNotFoundError, naming the option, when it cannot be built.
    """
    match config.kind:
        case ConditionerKind.none:
            return NoConditioner()
        case ConditionerKind.class_label:
            return ClassLabel(config.num_classes, config.width)
        case ConditionerKind.text:
            return Text(config)
