"""Conditioners: what the U-Net attends to, made from captions or class numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Context
from models.checks import conditioner_problems
from models.clip import load_clip
from models.config import ConditionerConfig, ConditionerKind, TextFeatures
from models.text_encoder import load_text_encoder
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

    def forward(self, captions: Captions) -> Context | None:
        """B captions → tokens [B, T, context_dim] float32, on the conditioner's device."""
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
        self.num_classes = num_classes
        self.context_dim = width
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, captions: Captions) -> Context:
        """See the base class; T = 1. Raises ValueError for a caption that is no class number."""
        classes = [self._class_number(caption) for caption in captions]
        indices = torch.tensor(classes, device=self.embedding.weight.device)
        return Context(self.embedding(indices)[:, None].float())

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
    """What a frozen text encoder makes of captions; the empty caption stands for no condition.

    pads: whether contexts have a mask, which leaves the padding of short captions out.
    """

    trainable = False
    pads: bool

    def __init__(self, config: ConditionerConfig, width: int, architecture: dict[str, Any]) -> None:
        """width: of the encoder's tokens; architecture: of the encoder, JSON values."""
        super().__init__()
        if width != config.width:
            raise ValueError(
                f"conditioner.width = {config.width}, but {config.features} of "
                f"{config.model or config.pretrained} is {width} wide: set conditioner.width and "
                f"unet.context_dim to that"
            )
        self.context_dim = width
        self.features = config.features
        self.architecture = architecture

    def train(self, mode: bool = True) -> "Text":
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, captions: Captions) -> Context:
        """See the base class; captions that are too long are cut."""
        raise NotImplementedError

    def restore(self, tokens: Tensor) -> Context:
        """The context of tokens [B, T, context_dim] that `forward` gave and a file kept.

        Padding is kept as rows of zeros, which no encoder makes of a token.
        """
        return Context(tokens, tokens.any(dim=-1) if self.pads else None)


class ClipText(Text):
    """The text tower of a CLIP by open_clip (Rombach et al. 2022, section 3.3).

    As in Stable Diffusion, padding is attended to: the tower was trained to see nothing in it.
    """

    pads = False

    def __init__(self, config: ConditionerConfig) -> None:
        clip = load_clip(config)
        pooled = config.features is TextFeatures.pooled
        super().__init__(
            config, clip.embed_dim if pooled else clip.text_width, clip.text_architecture
        )
        self.tokenizer = clip.tokenizer
        self.clip: Any = clip.model
        del self.clip.visual

    @torch.no_grad()
    def forward(self, captions: Captions) -> Context:
        """See the base class; T is the tower's context length, or 1 for pooled features."""
        ids = self.tokenizer([caption or "" for caption in captions]).to(
            self.clip.logit_scale.device
        )
        if self.features is TextFeatures.pooled:
            return Context(self.clip.encode_text(ids)[:, None].float())
        states = self.clip.forward_intermediates(
            text=ids,
            text_indices=2 if self.features is TextFeatures.penultimate else 1,
            normalize_intermediates=True,
            intermediates_only=True,
        )
        return Context(states["text_intermediates"][0].float())


class TransformersText(Text):
    """Any text encoder of the transformers library, such as T5's (Saharia et al. 2022)."""

    def __init__(self, config: ConditionerConfig) -> None:
        encoder = load_text_encoder(config)
        architecture = encoder.architecture | {"context_length": config.context_length}
        super().__init__(config, encoder.width, architecture)
        self.pads = config.features is not TextFeatures.pooled
        self.context_length = config.context_length
        self.tokenizer = encoder.tokenizer
        self.encoder: Any = encoder.model
        self._check_tokenizer()

    @torch.no_grad()
    def forward(self, captions: Captions) -> Context:
        """See the base class; T is conditioner.context_length, or 1 for pooled features."""
        ids, mask = self._tokenize(captions)
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        tokens = states.float().masked_fill(~mask[:, :, None], 0.0)
        if self.features is TextFeatures.pooled:
            # the mean of the tokens (Reimers and Gurevych 2019, section 3)
            return Context(tokens.sum(1, keepdim=True) / mask.sum(1)[:, None, None])
        return Context(tokens, mask)

    def _tokenize(self, captions: Captions) -> tuple[Tensor, Tensor]:
        """Numbers and mask of the tokens of B captions, two of [B, T]."""
        found = self.tokenizer(
            [caption or "" for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        return found["input_ids"].to(device), found["attention_mask"].to(device, torch.bool)

    def _check_tokenizer(self) -> None:
        longest = self.tokenizer.model_max_length
        if self.context_length > longest:
            raise ValueError(
                f"conditioner.context_length = {self.context_length} is more than the {longest} "
                f"tokens that conditioner.pretrained takes"
            )
        try:
            _, mask = self._tokenize([None])
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"conditioner.pretrained: its tokenizer cannot pad ({reason}): choose another"
            ) from error
        if not mask.any():
            raise ValueError(
                "conditioner.pretrained: its tokenizer makes nothing of the empty caption, which "
                "stands for no condition: choose another"
            )


def fingerprint(text: Text) -> str:
    """Identity of a text encoder: SHA-256, in hex, of its options and its weights as fp32."""
    return hash_network(text, {**text.architecture, "features": text.features.value})


def build_conditioner(config: ConditionerConfig) -> Conditioner:
    """The conditioner that the options describe.

    Raises ValueError or FileNotFoundError, naming the option, when it cannot be built.
    """
    for problem in conditioner_problems(config):
        raise ValueError(problem)
    match config.kind:
        case ConditionerKind.none:
            return NoConditioner()
        case ConditionerKind.class_label:
            return ClassLabel(config.num_classes, config.width)
        case ConditionerKind.text:
            return ClipText(config)
        case ConditionerKind.transformers:
            return TransformersText(config)
