"""A label map as a condition (Rombach et al. 2022, section 4.3.2)."""

import colorsys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.given import Given
from models.config import ConditionerConfig
from models.config.conditioning import MAP_CLASSES


def label_colours(maps: Tensor) -> Tensor:
    """Colour each class of maps [B, H, W] by its own colour: [B, 3, H, W] in [-1, 1].

    Neighbouring numbers differ most: the hue goes around by the golden ratio.
    """
    hues = [(number * 0.6180339887) % 1 for number in range(MAP_CLASSES)]
    values = [0.95 if number % 2 else 0.65 for number in range(MAP_CLASSES)]
    colours = [colorsys.hsv_to_rgb(h, 0.7, v) for h, v in zip(hues, values, strict=True)]
    return torch.tensor(colours)[maps.long()].permute(0, 3, 1, 2) * 2 - 1


class SemanticMap(Conditioner):
    """Learned planes for each class, averaged to the size of the latents.

    The authors' SpatialRescaler halves one-hot maps by bilinear interpolation, which averages 2 x 2
    pixels, and then applies a 1x1 convolution without bias. Both are linear, so looking up a column
    of that convolution for each pixel and then averaging gives the same, without the one-hot maps.
    The null condition has zeros.
    """

    trainable = True
    context_dim = 0

    def __init__(self, config: ConditionerConfig) -> None:
        """config: num_classes and planes."""
        super().__init__()
        self.embedding = nn.Embedding(config.num_classes, config.planes)
        # as the convolution that it stands for
        nn.init.kaiming_uniform_(self.embedding.weight.T, a=5**0.5)

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Return the class numbers [B, H, W], all below num_classes.

        Raises: ValueError where there is no map.
        """
        if given.maps is None:
            raise ValueError(
                "conditioner.kind=semantic_map needs label maps: sample.maps, or in training "
                "data.maps=true"
            )
        return {"map": given.maps, "known": given.known}

    @override
    def picture(self, given: Given, size: Size) -> Tensor:
        assert given.maps is not None
        return label_colours(given.maps)

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Make planes [B, planes, h, w]; the map's sides are multiples of the latents'."""
        planes = F.embedding(inputs["map"].int(), self.embedding.weight).permute(0, 3, 1, 2)
        height, width = planes.shape[-2:]
        planes = F.avg_pool2d(planes.float(), (height // size[0], width // size[1]))
        return Condition(planes=planes * inputs["known"][:, None, None, None])
