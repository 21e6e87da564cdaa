"""Classes as a condition (Rombach et al. 2022, section 4.3.1)."""

import torch
from torch import nn
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.given import Given
from models.config import ConditionerConfig, ConditionerKind
from models.config.conditioning import CONDITIONERS


class ClassLabel(Conditioner):
    """A learned token for each class; captions are class numbers in decimal digits.

    The null class has the number `num_classes`.
    """

    trainable = True

    def __init__(self, config: ConditionerConfig) -> None:
        """config: num_classes and width."""
        super().__init__()
        self._config = config
        self.num_classes = config.num_classes
        self.context_dim = config.width
        self.embedding = nn.Embedding(config.num_classes + 1, config.width)

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Read the class numbers [B].

        Raises: ValueError for a caption that is not a class number.
        """
        numbers = [self._class_number(caption) for caption in given.captions]
        return {"classes": torch.tensor(numbers)}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Look up the tokens [B, 1, width]."""
        return Condition(self.embedding(inputs["classes"])[:, None].float())

    def _class_number(self, caption: str | None) -> int:
        if caption is None:
            return self.num_classes
        if problem := CONDITIONERS[ConditionerKind.class_label].caption_problem(
            self._config, caption
        ):
            raise ValueError(problem)
        return int(caption.strip())  # int() itself keeps the separators U+001C to U+001F
