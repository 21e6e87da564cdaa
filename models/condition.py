"""The condition of a denoising step: tokens, their mask, and planes beside the latents."""

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """Condition of B samples; `Condition()` is the condition of an unconditional model.

    It is a tuple because ZeRO stage 3 finds a module's input tensors only in tuples, lists, dicts.
    """

    tokens: Tensor | None = None
    """[B, M, width], for the U-Net's cross-attention."""
    mask: Tensor | None = None
    """[B, M] bool: false for padding, which attention skips; None: no padding."""
    planes: Tensor | None = None
    """[B, C, h, w], concatenated to the latents (Rombach et al. 2022, section 4.3.2)."""

    @property
    def is_empty(self) -> bool:
        """Whether there are neither tokens nor planes."""
        return self.tokens is None and self.planes is None


def join_conditions(first: Condition, second: Condition) -> Condition:
    """Concatenate the conditions of B and of B' samples to one of B + B'.

    Raises: ValueError if one has a part that the other lacks.
    """
    parts: dict[str, Tensor] = {}
    for name in Condition._fields:
        both = getattr(first, name), getattr(second, name)
        tensors = [part for part in both if part is not None]
        if len(tensors) == 1:
            raise ValueError(f"only one of two conditions has {name}")
        if tensors:
            parts[name] = torch.cat(tensors)
    return Condition(**parts)
