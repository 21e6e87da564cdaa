"""The base class of feature extractors: uint8 images in, one vector for each image out."""

import hashlib
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.config.choices import Features
from trainer.runtime.products import fp32_products

_safetensors: Any = safetensors.torch  # its types are incomplete


SLICE = 64
"""Images that a network sees at once: the widest layers of each take about 1 GiB for them."""


class FeatureExtractor(nn.Module):
    """A frozen network; its pooled activations are the features of an image.

    fingerprint: SHA-256 of the loaded weights. resize: the name of the resize to the input size
    of the network. Features of other weights or of another resize cannot be compared.
    """

    def __init__(
        self, name: Features, num_features: int, network: nn.Module, *, resize: str
    ) -> None:
        """num_features: D of the features [B, D]. network: a subclass runs it in `pooled`."""
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.resize = resize
        self.fingerprint = _fingerprint(network)
        _fold_batch_norms(network)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Extract the features of images.

        images: [B, 3, H, W] uint8, RGB; returns [B, num_features] float32.
        They come in slices, exactly in fp32, for the memory and for numbers that can be compared.

        Raises: ValueError for another shape or type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name} takes uint8 images [B, 3, H, W], not {images.dtype} "
                f"{list(images.shape)}"
            )
        with torch.inference_mode(), fp32_products(tf32=False):
            return torch.cat([self.pooled(part) for part in torch.split(images, SLICE)])

    def pooled(self, images: Tensor) -> Tensor:
        """Resize images, run the network, pool: [B, 3, H, W] uint8 → [B, num_features] float32."""
        raise NotImplementedError


BICUBIC = "antialiased bicubic to {size} px"
"""Description of `bicubic`, for protocols and references."""


def bicubic(images: Tensor, size: int) -> Tensor:
    """Resize images in [0, 255] with antialiasing: [B, 3, H, W] → [B, 3, size, size] float32.

    Values are clamped to [0, 255], because bicubic interpolation overshoots at edges.
    """
    pixels = images.float()
    if images.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels.clamp_(0, 255)


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """Read weights from a safetensors file, or from a file of torch.save that has tensors only.

    Raises: FileNotFoundError or ValueError that names the option and the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _safetensors.load_file(path)
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
    """Fold each BatchNorm into the convolution before it, in the order of registration."""
    network.eval()
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
