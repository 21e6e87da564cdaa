"""An image with a hole as a condition (Rombach et al. 2022, section 4.5)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.given import Given
from models.conditioning.masks import draw_holes
from models.config import ConditionerConfig


class Inpainting(Conditioner):
    """Latents of the image with a black hole, and the mask of the hole, as planes.

    The null condition has zeros.
    """

    trainable = False
    context_dim = 0
    images = ("masked",)
    here: Tensor

    def __init__(self, config: ConditionerConfig) -> None:
        """config: has no options of this kind."""
        super().__init__()
        self.register_buffer("here", torch.zeros(()), persistent=False)  # tells the device

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Cut the holes: the image [B, 3, H, W] in [-1, 1], and the mask [B, 1, H, W].

        Raises: ValueError where there is no image.
        """
        images, holes = _images(given), _holes(given)
        masked = images * (1 - holes) - holes
        return {"masked": masked, "holes": holes, "known": given.known}

    @override
    def picture(self, given: Given, size: Size) -> Tensor:
        return self.prepare(given, size)["masked"]

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Return planes [B, C + 1, h, w]; the mask is in [-1, 1], 1 in the hole."""
        mask = F.interpolate(inputs["holes"], size) * 2 - 1
        planes = torch.cat([inputs["masked"].float(), mask], dim=1)
        return Condition(planes=planes * inputs["known"][:, None, None, None])

    @override
    def paste(self, drawn: Tensor, given: Given) -> Tensor:
        """Keep the known pixels: drawn images [B, 3, H, W] uint8 fill the holes alone."""
        pixels = ((_images(given) + 1) * 127.5).round().clamp(0, 255).to(drawn.dtype)
        return torch.where(_holes(given) > 0.5, drawn, pixels)


def _images(given: Given) -> Tensor:
    if given.images is None:
        raise ValueError(
            "conditioner.kind=inpainting needs images: sample.images and sample.masks, or in "
            "training data.store_images=true"
        )
    return given.images


def _holes(given: Given) -> Tensor:
    if given.masks is not None:
        return given.masks
    height, width = _images(given).shape[-2:]
    return draw_holes(len(given.captions), (height, width), given.draws)
