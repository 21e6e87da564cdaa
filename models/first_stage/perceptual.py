"""Perceptual distance of images, between a network's activations: LPIPS (Zhang et al. 2018)."""

import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from models.config import PerceptualFeatures
from models.first_stage.efficientnet import EfficientNetLite0Levels

_linalg: Any = torch.linalg  # torch declares no types for it

OPTION = "autoencoder.loss.perceptual_weights"
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; a max pooling separates the levels."""
PIXEL_MEAN = (-0.030, -0.088, -0.188)
PIXEL_STD = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's pixels in [-1, 1], rounded as in the code of LPIPS."""
EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """Distance of unit-normalised activations, summed over levels (Zhang et al. 2018, equation 1).

    Frozen, and computed in fp32.
    """

    def __init__(self, levels: nn.Module, weights: list[Tensor] | None) -> None:
        """levels: images → a list of activations [B, C, h, w]; weights: [C] for each; None: 1."""
        super().__init__()
        self.levels = levels
        self.weights = None if weights is None else nn.ParameterList(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """images, others: [B, 3, H, W] in [-1, 1] → [B]; gradients go to `others` alone."""
        with torch.no_grad():
            targets = [_unit(level) for level in self.levels(images.float())]
        distance = torch.zeros(len(images), device=images.device)
        for number, level in enumerate(self.levels(others.float())):
            squares = (_unit(level) - targets[number]).square()
            if self.weights is not None:
                squares = squares * self.weights[number][:, None, None]
            distance = distance + squares.sum(1).mean((1, 2))
        return distance


def _unit(x: Tensor) -> Tensor:
    norm: Tensor = _linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (norm + EPSILON)


class Vgg16Levels(nn.Module):
    """VGG16's last activations at each resolution (Simonyan and Zisserman 2015).

    Its weights are random at first. `features` has the names of torchvision's layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._ends: list[int] = []
        width = 3
        for level in VGG_WIDTHS:
            for out in level:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self._ends.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W] in [-1, 1] → five activations [B, C, h, w]."""
        x = (images - self.mean) / self.std
        levels: list[Tensor] = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._ends:
                levels.append(x)
        return levels


def perceptual_name(features: PerceptualFeatures) -> str:
    """Return the name of the distance in logs; LPIPS is that of VGG16 alone."""
    return "lpips" if features is PerceptualFeatures.vgg16 else f"perceptual_{features}"


def build_perceptual(features: PerceptualFeatures, weights: str) -> PerceptualDistance:
    """Build the perceptual distance of these features, on the CPU.

    weights: path of VGG16's weights; empty: download them.

    Raises: ValueError or FileNotFoundError, naming the option, if a package or weights are missing.
    """
    match features:
        case PerceptualFeatures.vgg16:
            levels = Vgg16Levels()
            _load_vgg16(levels, weights)
            return PerceptualDistance(levels, lpips_weights())
        case PerceptualFeatures.efficientnet_lite0:
            levels = EfficientNetLite0Levels("autoencoder.loss.perceptual_features")
            return PerceptualDistance(levels, None)


def lpips_weights() -> list[Tensor]:
    """Read the authors' weights of VGG16's channels from the package lpips, v0.1: five of [C]."""
    package = importlib.util.find_spec("lpips")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"].flatten() for number in range(len(VGG_WIDTHS))]


def _load_vgg16(levels: Vgg16Levels, path: str) -> None:
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"{OPTION}: there is no file {path}")
    try:
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
        names = levels.features.state_dict()
        levels.features.load_state_dict({name: state[f"features.{name}"] for name in names})
    except (UnpicklingError, KeyError, TypeError, EOFError, OSError, RuntimeError) as error:
        if path:
            raise ValueError(f"{OPTION}: {path} does not hold torchvision's VGG16") from error
        raise ValueError(
            f"{OPTION}: VGG16 could not be downloaded ({error}); on a machine with network fetch "
            f"{url}, and set {OPTION} to that file; or choose "
            "autoencoder.loss.perceptual_features=efficientnet_lite0, which comes with the demo"
        ) from error
