"""What every image feature extractor does: uint8 images in, one vector an image out."""

import hashlib
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.config import Features


class FeatureExtractor(nn.Module):
    """Frozen network whose pooled activations describe an image.

    fingerprint is the SHA-256 of the weights as they were loaded, and resize says in words how
    images come to the network's size: features of other weights or another resize cannot be
    compared.
    """

    def __init__(
        self, name: Features, num_features: int, network: nn.Module, *, resize: str
    ) -> None:
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.resize = resize
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


BICUBIC = "antialiased bicubic to {size} px"
"""What bicubic does, in words."""


def bicubic(images: Tensor, size: int) -> Tensor:
    """Images of any type and size → [B, 3, size, size] float32, still in [0, 255].

    Antialiased, and clamped: bicubic overshoots at edges, networks were trained on pixels in range.
    """
    pixels = images.float()
    if images.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels.clamp_(0, 255)


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """Weights from a safetensors file, or from one of torch.save that holds nothing but tensors.

    Raises FileNotFoundError or ValueError, naming the option and the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{option}: {path} is not a file of tensors saved by torch.save"
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
