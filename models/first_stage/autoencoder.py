"""First stages: a KL-regularised and a vector-quantised autoencoder (Rombach et al. 2022, 3.1).

State-dict names are those of diffusers' AutoencoderKL and VQModel.
"""

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import AutoencoderConfig, AutoencoderKind
from models.first_stage.codebook import Quantized, VectorQuantizer
from models.first_stage.first_stage import (
    LOG_VARIANCE_RANGE,
    FirstStage,
    Identity,
    Reconstruction,
    deterministic,
)
from models.layers.blocks import Downsample, MidBlock, ResBlock, SpatialAttention
from models.layers.group_norm import GroupNormSiLU
from models.weights.compvis import load_first_stage
from models.weights.files import hash_network

NORM_EPS = 1e-6


class Autoencoder(FirstStage):
    """A first stage of convolutions, which can be trained."""

    def __init__(self, config: AutoencoderConfig, *, encoder_channels: int) -> None:
        """encoder_channels: channels of the encoder's output.

        Raises: ValueError naming an option that fits no network.
        """
        super().__init__(config)
        _check(config)
        channels = config.latent_channels
        self.encoder = Encoder(config, encoder_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(encoder_channels, encoder_channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(_fast_layout(latents)))

    @abstractmethod
    def forward(self, images: Tensor, noise: Tensor | None) -> Reconstruction:
        """Encode, draw latents from the posterior, and decode.

        images: [B, 3, H, W] in [-1, 1]; noise: [B, C, h, w] standard normal; None: the latents are
        the posterior's mean.
        """

    def _encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(_fast_layout(images)))


class AutoencoderKL(Autoencoder):
    """A variational autoencoder: Gaussian latents, near N(0, I) (Kingma and Welling 2014)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, encoder_channels=2 * config.latent_channels)

    @override
    def encode(self, images: Tensor) -> Tensor:
        mean, log_variance = self._encode(images).chunk(2, dim=1)
        return torch.stack([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    @override
    def forward(self, images: Tensor, noise: Tensor | None) -> Reconstruction:
        moments = self.encode(images)
        latents = moments[:, 0] if noise is None else sample_posterior(moments, noise)
        return Reconstruction(self.decode(latents), kl_divergence(moments.float()).mean(), None)


class AutoencoderVQ(Autoencoder):
    """A vector-quantised autoencoder: it decodes codes (Esser et al. 2021, section 3.1).

    Diffusion models learn the latents before quantisation, which is the first layer of the decoder
    (Rombach et al. 2022, section 3.1). The encoder is deterministic.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, encoder_channels=config.latent_channels)
        self.quantize = VectorQuantizer(
            config.num_embeddings,
            config.latent_channels,
            decay=config.codebook_decay,
            revival=config.codebook_revival,
        )

    @override
    def encode(self, images: Tensor) -> Tensor:
        return deterministic(self._encode(images))

    @override
    def decode(self, latents: Tensor) -> Tensor:
        """Replace latents [B, C, h, w] by their nearest codes, and decode them."""
        return super().decode(self.quantize(latents).latents)

    @override
    def forward(self, images: Tensor, noise: Tensor | None) -> Reconstruction:
        """Encode, quantise and decode; the noise is not used."""
        quantized: Quantized = self.quantize(self._encode(images))
        reconstruction = super().decode(quantized.latents)
        return Reconstruction(reconstruction, quantized.loss, quantized.codes)


class Level(nn.Module):
    """ResBlocks at one resolution, with or without attention, then a resampling if it has one."""

    def __init__(self, config: AutoencoderConfig, level: int, in_width: int, count: int) -> None:
        """level: 0 is the highest resolution; count: ResBlocks."""
        super().__init__()
        width = config.block_out_channels[level]
        self.resnets = nn.ModuleList(_resnets(count, in_width, width, config.norm_groups))
        attentions = count if level in config.attention_levels else 0
        self.attentions = nn.ModuleList(_attention(width, config) for _ in range(attentions))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w] → [B, C', h', w'], with half or double the resolution if resampled."""
        for number, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[number](x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class UpsampleConv(nn.Conv2d):
    """A 3x3 convolution of x upsampled to double resolution by nearest neighbour.

    Computed by one transposed convolution: 4/9 of the FLOPs, and no intermediate to store. Its
    arguments are those of nn.Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, C, h, w] → [B, C', 2h, 2w]."""
        kernel = _sum_neighbours(_sum_neighbours(self.weight, 2), 3).transpose(0, 1)
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


def _sum_neighbours(weight: Tensor, dim: int) -> Tensor:
    """Turn 3 taps on doubled pixels into 4 taps on the pixels themselves, in reverse order."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([last, middle + last, first + middle, first], dim)


class Encoder(nn.Module):
    """The convolutional encoder, without quant_conv."""

    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        width = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, level_width in enumerate(config.block_out_channels):
            block = Level(config, level, width, config.layers_per_block)
            if level < len(config.block_out_channels) - 1:
                block.downsamplers.append(Downsample(level_width, pad_right_only=True))
            self.down_blocks.append(block)
            width = level_width
        self.mid_block = _mid_block(width, config)
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: images [B, 3, H, W] → [B, out_channels, h, w]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """The convolutional decoder, without post_quant_conv."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid_block = _mid_block(width, config)
        self.up_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(config.block_out_channels))):
            block = Level(config, level, width, config.layers_per_block + 1)
            if level > 0:
                upsample = UpsampleConv(level_width, level_width, 3)
                block.upsamplers.append(nn.Sequential(OrderedDict(conv=upsample)))
            self.up_blocks.append(block)
            width = level_width
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w] → images [B, 3, H, W]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


def _resnets(count: int, in_width: int, width: int, groups: int) -> list[ResBlock]:
    in_widths = [in_width, *[width] * (count - 1)]
    return [ResBlock(first, width, groups=groups, eps=NORM_EPS) for first in in_widths]


def _attention(width: int, config: AutoencoderConfig) -> SpatialAttention:
    return SpatialAttention(width, 1, groups=config.norm_groups, eps=NORM_EPS)


def _mid_block(width: int, config: AutoencoderConfig) -> MidBlock:
    attention = _attention(width, config) if config.mid_attention else None
    first, second = _resnets(2, width, width, config.norm_groups)
    return MidBlock(first, attention, second)


def _fast_layout(x: Tensor) -> Tensor:
    """Return x channels-last on a CPU, where this layout makes convolutions fastest."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x


def _check(config: AutoencoderConfig) -> None:
    levels = len(config.block_out_channels)
    for level in config.attention_levels:
        if not 0 <= level < levels:
            raise ValueError(
                f"autoencoder.attention_levels has {level}, but autoencoder.block_out_channels "
                f"has the levels 0 to {levels - 1}"
            )


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw latents from the posterior (Kingma and Welling 2014, section 2.4).

    moments: [B, 2, C, h, w]; noise: [B, C, h, w] standard normal → latents [B, C, h, w].
    """
    mean, log_variance = moments.unbind(dim=1)
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(moments: Tensor) -> Tensor:
    """Return the posterior's KL divergence from N(0, I) (Kingma and Welling 2014, appendix B).

    moments: [B, 2, C, h, w] → [B] nats, summed over channels and pixels.
    """
    mean, log_variance = moments.unbind(dim=1)
    terms = mean.square() + log_variance.exp() - 1.0 - log_variance
    return 0.5 * terms.flatten(1).sum(dim=1)


def build_stage(config: AutoencoderConfig) -> FirstStage:
    """Build the first stage of the options; if it has weights, they are random.

    Raises: ValueError naming an option that fits no network.
    """
    if config.kind is AutoencoderKind.identity:
        return Identity(config)
    return build_autoencoder(config)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build a first stage that can be trained, with random weights.

    Raises: ValueError naming an option that fits no network.
    """
    match config.kind:
        case AutoencoderKind.kl:
            return AutoencoderKL(config)
        case AutoencoderKind.vq:
            return AutoencoderVQ(config)
        case AutoencoderKind.identity:
            raise ValueError("autoencoder.kind=identity has nothing to train")


def load_autoencoder(config: AutoencoderConfig) -> FirstStage:
    """Build the first stage with the weights at `config.weights`, in fp32 on the CPU.

    The file has our, diffusers' or CompVis' names, in fp32 or fp16.

    Raises: FileNotFoundError if there is no such file; ValueError if it cannot be read, or has the
    weights of another network.
    """
    if config.kind is AutoencoderKind.identity:
        return Identity(config)
    if not config.weights:
        raise ValueError(
            "autoencoder.weights is empty: set it to the safetensors file of a trained first stage"
        )
    autoencoder = build_autoencoder(replace(config, codebook_decay=0.0))  # codes are constant
    load_first_stage(autoencoder, Path(config.weights))
    return autoencoder


def fingerprint(autoencoder: FirstStage) -> str:
    """Identify a first stage: SHA-256, in hex, of its architecture and its weights as fp32.

    Call it before the network is cast to a narrower type.
    """
    # the names and shapes of the weights show attention and codebook
    codebook = {"num_embeddings", "codebook_decay", "codebook_revival"}
    skipped = {"weights", "loss", "attention_levels", *codebook}
    architecture = {
        option.name: getattr(autoencoder.config, option.name)
        for option in fields(autoencoder.config)
        if option.name not in skipped
    }
    return hash_network(autoencoder, architecture)
