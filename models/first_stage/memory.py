"""Memory of a first stage that does not train."""

from models.config import AutoencoderConfig, AutoencoderKind

LIVE_TENSORS = 3
"""Tensors of a ResBlock's input that live at once: itself, normalised, and padded or activated."""


def activation_bytes(config: AutoencoderConfig, pixels: int, width: int) -> int:
    """Return the most bytes of activations while an image is encoded or decoded.

    pixels: of the image, height x width; width: bytes of a number. The widest ResBlock decides; in
    the decoder, the first of a level has the channels of the level below.
    """
    if config.kind is AutoencoderKind.identity:
        return config.in_channels * pixels * width
    channels = config.block_out_channels
    inputs = zip(channels, [*channels[1:], channels[-1]], strict=True)
    numbers = max(
        max(own, below) * (pixels // 4**level) for level, (own, below) in enumerate(inputs)
    )
    return LIVE_TENSORS * numbers * width
