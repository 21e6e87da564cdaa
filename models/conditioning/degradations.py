"""Make small, worse pictures of images, the conditions of super-resolution."""

import io
import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.conditioning.given import Draws
from models.config.choices import Degradation

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
STEPS = 5
"""Steps in random order: two blurs, a resize, noise and JPEG."""
KERNEL = 15
"""[pixels] Side of a blur's kernel."""
BLUR = 0.2, 1.4
"""[pixels] Deviation of a blur, along each of its axes."""
NOISE = 2 / 255
"""Largest deviation of the noise, for pixels in [0, 1]."""
QUALITY = 80, 95
"""Quality of JPEG."""
UNIFORMS = STEPS + 12


def degrade(
    images: Tensor, size: tuple[int, int], degradation: Degradation, draws: Draws | None = None
) -> Tensor:
    """Shrink images [B, 3, H, W] in [-1, 1] to size (h, w): [B, 3, h, w] in [-1, 1], of 8 bits.

    draws: for `bsr_light`; without them, and for `bicubic`, the filter is antialiased bicubic.
    """
    if draws is None or degradation is Degradation.bicubic:
        return bicubic(images, size)
    (height, width), small = size, list[Image.Image]()
    uniform, noise = draws.uniform(UNIFORMS), draws.normal((*images.shape[-2:], 3))
    for image, chances, field in zip(_pictures(images), uniform, noise, strict=True):
        small.append(_bsr_light(image, (width, height), chances, field))
    return _tensor(small)


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B, 3, H, W] in [-1, 1] to size (h, w): [B, 3, h, w] in [-1, 1], of 8 bits."""
    height, width = size
    resample = Image.Resampling.BICUBIC
    return _tensor(one.resize((width, height), resample) for one in _pictures(images))


def _bsr_light(
    image: Image.Image,
    size: tuple[int, int],
    chances: NDArray[np.float64],
    noise: NDArray[np.float32],
) -> Image.Image:
    """Degrade by the light form of BSRGAN's model (Zhang et al. 2021, section 3).

    Its steps come in random order: two Gaussian blurs, a resize between the two sizes, noise, and
    JPEG; at the end come the resize to `size` (w, h), and JPEG. chances: [UNIFORMS] from [0, 1).
    noise: [H, W, 3], standard normal.
    """
    order, rest = chances[:STEPS].argsort(), chances[STEPS:]
    for step in order.tolist():
        if step < 2:
            image = _blurred(image, rest[3 * step : 3 * step + 3])
        elif step == 2:
            smallest = size[0] / image.width
            share = smallest + (1 - smallest) * rest[6]
            between = max(round(image.width * share), 1), max(round(image.height * share), 1)
            image = image.resize(between, _filter(rest[7]))
        elif step == 3:
            pixels = np.asarray(image, np.float32)
            field = noise[: pixels.shape[0], : pixels.shape[1]]
            pixels = pixels + field * np.float32(255 * NOISE * rest[8])
            image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        else:
            image = _jpeg(image, rest[9])
    return _jpeg(image.resize(size, _filter(rest[10])), rest[11])


def _blurred(image: Image.Image, chances: NDArray[np.float64]) -> Image.Image:
    """Blur by a Gaussian with its own deviation along each of two turned axes."""
    low, high = BLUR
    along, across = (low + (high - low) * chances[:2]).tolist()
    angle = math.pi * float(chances[2])
    at = torch.arange(KERNEL) - KERNEL // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    turned = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((turned[0] / along) ** 2 + (turned[1] / across) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, KERNEL, KERNEL)
    pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float()
    half = KERNEL // 2
    padded = F.pad(pixels, (half, half, half, half), mode="replicate")
    blurred = F.conv2d(padded, kernel, groups=3)[0].permute(1, 2, 0)
    return Image.fromarray(blurred.round().clamp(0, 255).byte().numpy())


def _jpeg(image: Image.Image, chance: float) -> Image.Image:
    low, high = QUALITY
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=low + int(chance * (high - low + 1)))
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")


def _filter(chance: float) -> Image.Resampling:
    return FILTERS[int(chance * len(FILTERS))]


def _pictures(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] → 8-bit pictures."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one.contiguous().numpy()) for one in pixels]


def _tensor(pictures: Iterable[Image.Image]) -> Tensor:
    """8-bit pictures of one size → [B, 3, H, W] in [-1, 1]."""
    stacked = torch.as_tensor(np.stack([np.asarray(image) for image in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
