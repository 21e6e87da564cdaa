"""Frozen text encoders as conditioners."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.given import Captions, Given
from models.config import ConditionerConfig
from models.weights.files import hash_network


class Text(Conditioner):
    """A frozen text encoder as a conditioner; None is encoded as the empty caption.

    Captions that are too long are cut.
    """

    trainable = False

    def __init__(self, config: ConditionerConfig, width: int, architecture: dict[str, Any]) -> None:
        """width: of the encoder's tokens; architecture: of the encoder, JSON values.

        Raises: ValueError if conditioner.width is not `width`.
        """
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

    @override
    def train(self, mode: bool = True) -> "Text":
        """Stay in evaluation mode, because the encoder is frozen."""
        return super().train(False)

    def run_in(self, dtype: torch.dtype) -> None:
        """Cast the encoder for good; its fingerprint names the precision from then on."""
        assert self.weights_hash  # of the weights as they were loaded
        self.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the encoder; its tokens are fp32 in any."""
        return next(self.parameters()).dtype

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256, in hex, of the options and of the weights as fp32."""
        return hash_network(self, {**self.architecture, "features": self.features.value})

    def encode(self, captions: Captions) -> Tensor:
        """Encode B captions to tokens [B, T, context_dim] float32, on the encoder's device.

        Raises: ValueError for a caption that the encoder cannot take.
        """
        tokens = self.condition(Given(captions), (1, 1)).tokens  # no token depends on the size
        assert tokens is not None
        return tokens

    def restore(self, tokens: Tensor, dropped: Tensor) -> Condition:
        """Make a condition from stored tokens of `forward`.

        tokens: [B, T, context_dim], with rows of zeros for padding; no encoder gives such a row for
        a token. dropped: [B] bool, true for samples that get the condition of the empty caption.
        """
        null, mask = self._null_on(tokens.device)
        if mask is not None:
            mask = torch.where(dropped[:, None], mask, tokens.any(dim=-1))
        return Condition(torch.where(dropped[:, None, None], null, tokens), mask)

    def _null_on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return `_null` on a device, to which it is copied once."""
        tokens, mask = self._null
        if tokens.device != device:
            self._null = tokens.to(device), None if mask is None else mask.to(device)
        return self._null

    @cached_property
    def _null(self) -> tuple[Tensor, Tensor | None]:
        """Encode the empty caption to tokens [1, T, context_dim] and mask [1, T], or None."""
        tokens, mask, _ = self.condition(Given([None]), (1, 1))
        assert tokens is not None
        return tokens, mask


def text_fingerprint(text: Text) -> str:
    """Identify a text encoder: SHA-256, in hex, of its options and its weights as fp32.

    Another precision than fp32 follows after a colon, as in `HASH:bfloat16`.
    """
    other = "" if text.dtype is torch.float32 else str(text.dtype).replace("torch.", ":")
    return text.weights_hash + other


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, in any precision."""
    return one.partition(":")[0] == other.partition(":")[0]
