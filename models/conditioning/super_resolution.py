"""A small picture as a condition (Rombach et al. 2022, section 4.4)."""

import torch
from torch import Tensor
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.degradations import degrade
from models.conditioning.given import Given
from models.config import ConditionerConfig


class SuperResolution(Conditioner):
    """The small picture itself, which has the size of the latents, as three planes.

    It is given (`Given.small`), or made of the image by conditioner.degradation. The null condition
    has zeros: mid-grey.
    """

    trainable = False
    context_dim = 0
    here: Tensor

    def __init__(self, config: ConditionerConfig) -> None:
        """config: degradation."""
        super().__init__()
        self._degradation = config.degradation
        self.register_buffer("here", torch.zeros(()), persistent=False)  # tells the device

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Make the small pictures [B, 3, h, w], 8 bits in [-1, 1].

        Raises: ValueError where there is neither a small picture nor an image.
        """
        small = given.small
        if small is None:
            if given.images is None:
                raise ValueError(
                    "conditioner.kind=super_resolution needs pictures: sample.images, or in "
                    "training data.store_images=true"
                )
            small = degrade(given.images, size, self._degradation, given.draws)
        return {"small": small * given.known[:, None, None, None]}

    @override
    def picture(self, given: Given, size: Size) -> Tensor:
        """Return the small pictures [B, 3, h, w]."""
        return self.prepare(given, size)["small"]

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Return the planes [B, 3, h, w]."""
        return Condition(planes=inputs["small"].float())
