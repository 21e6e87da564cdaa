"""The first stage: a KL-regularised autoencoder (Rombach et al. 2022, section 3.1)."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from models.activations import GroupNormSiLU
from models.blocks import Downsample, MidBlock, ResBlock, SpatialAttention, Upsample
from models.config import AutoencoderConfig
from models.weights import load_weights

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class AutoencoderKL(nn.Module):
    """Images to the moments of a Gaussian over latents, and latents back to images.

    State-dict names are those of diffusers' AutoencoderKL.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] → moments [B, 2, C, h, w]: mean and log-variance."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.stack([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w] → images [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class EncoderBlock(nn.Module):
    """ResBlocks at one resolution, then half of it."""

    def __init__(self, resnets: list[ResBlock], downsample: Downsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([] if downsample is None else [downsample])

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    """ResBlocks at one resolution, then twice it."""

    def __init__(self, resnets: list[ResBlock], upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images [B, 3, H, W] → [B, 2·C, h, w], before quant_conv."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = widths[0]
        for level, level_width in enumerate(widths):
            last = level == len(widths) - 1
            resnets = _resnets(config.layers_per_block, width, level_width, config.norm_groups)
            downsample = None if last else Downsample(level_width, pad_right_only=True)
            self.down_blocks.append(EncoderBlock(resnets, downsample))
            width = level_width
        self.mid_block = _mid_block(width, config)
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Latents [B, C, h, w], after post_quant_conv → images [B, 3, H, W]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _mid_block(widths[0], config)
        self.up_blocks = nn.ModuleList()
        width = widths[0]
        for level, level_width in enumerate(widths):
            last = level == len(widths) - 1
            resnets = _resnets(config.layers_per_block + 1, width, level_width, config.norm_groups)
            self.up_blocks.append(DecoderBlock(resnets, None if last else Upsample(level_width)))
            width = level_width
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


def _resnets(count: int, in_width: int, width: int, groups: int) -> list[ResBlock]:
    in_widths = [in_width, *[width] * (count - 1)]
    return [ResBlock(first, width, groups=groups, eps=NORM_EPS) for first in in_widths]


def _mid_block(width: int, config: AutoencoderConfig) -> MidBlock:
    attention = (
        SpatialAttention(width, 1, groups=config.norm_groups, eps=NORM_EPS)
        if config.mid_attention
        else None
    )
    first, second = _resnets(2, width, width, config.norm_groups)
    return MidBlock(first, attention, second)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents drawn from the posterior (Kingma and Welling 2014, section 2.4).

    moments: [B, 2, C, h, w]; noise: [B, C, h, w] standard normal → latents [B, C, h, w].
    """
    mean, log_variance = moments.unbind(dim=1)
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(moments: Tensor) -> Tensor:
    """KL of the posterior from N(0, I), in nats (Kingma and Welling 2014, appendix B).

    moments: [B, 2, C, h, w] → [B], summed over a latent.
    """
    mean, log_variance = moments.unbind(dim=1)
    terms = mean.square() + log_variance.exp() - 1.0 - log_variance
    return 0.5 * terms.flatten(1).sum(dim=1)


def load_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """The autoencoder with the fp32 or fp16 weights at `config.weights`, in fp32 on the CPU.

    Raises FileNotFoundError when there is no such file, ValueError when it is not a safetensors
    file or holds another network than the config describes.
    """
    if not config.weights:
        raise ValueError(
            "autoencoder.weights is empty: set it to the safetensors file of a trained first stage"
        )
    autoencoder = AutoencoderKL(config)
    load_weights(
        autoencoder,
        Path(config.weights),
        option="autoencoder.weights",
        described_by="autoencoder.*",
    )
    return autoencoder


def fingerprint(autoencoder: AutoencoderKL) -> str:
    """Identity of an encoder: SHA-256, in hex, of its architecture and its weights as fp32.

    Take it before the network is cast to a narrower type.
    """
    skipped = {"weights", "loss"}
    architecture = {
        option.name: getattr(autoencoder.config, option.name)
        for option in fields(autoencoder.config)
        if option.name not in skipped
    }
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
