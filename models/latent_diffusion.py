"""The trained module: the U-Net with its conditioner, on normalised latents."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs
from models.first_stage.first_stage import FirstStage
from models.unet import UNet2DCondition


class LatentScale(nn.Module):
    """Mean and standard deviation of each latent channel, or one factor for all channels.

    Put it on the device of the latents: then no call copies numbers to there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """mean, std: of C channels."""
        super().__init__()
        self.values = {"mean": list(mean), "std": list(std)}
        """The arguments, JSON values."""
        for name, numbers in self.values.items():
            self.register_buffer(name, torch.tensor(numbers).view(-1, 1, 1))

    @classmethod
    def by_factor(cls, factor: float, channels: int) -> Self:
        """Multiply all channels by one factor, > 0 (diffusers' scaling_factor)."""
        return cls([0.0] * channels, [1 / factor] * channels)

    @property
    def is_factor(self) -> bool:
        """Whether it is one factor for all channels."""
        return not any(self.values["mean"]) and len(set(self.values["std"])) == 1

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise the first stage's latents [B, C, h, w], to variance 1 or near it."""
        return (latents - self.mean) / self.std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Invert `normalise`: [B, C, h, w] → latents for the first stage, [B, C, h, w]."""
        return latents * self.std + self.mean


@torch.no_grad()
def encode_normalised(first_stage: FirstStage, scale: LatentScale, images: Tensor) -> Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] to the normalised means of their posteriors.

    Returns [B, C, h, w] float32; first_stage, scale and images are on one device.
    """
    return scale.normalise(first_stage.encode(images.to(first_stage.dtype))[:, 0].float())


class LatentDiffusion(nn.Module):
    """The U-Net and, if it is trained with the U-Net, the conditioner."""

    def __init__(self, unet: UNet2DCondition, conditioner: Conditioner | None) -> None:
        """conditioner: None if it is frozen."""
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition | Inputs) -> Tensor:
        """Predict with the U-Net in its own precision.

        latents: [B, C, h, w] noisy, normalised; timesteps: [B]; condition: of B samples,
        or what the trained conditioner prepared of them and now embeds. Planes become channels
        after the latents'.
        Returns [B, C, h, w] in the latents' dtype.

        Raises: ValueError for inputs without a trained conditioner, and for a condition that does
        not fit the U-Net.
        """
        given = condition if isinstance(condition, Condition) else self._embed(condition, latents)
        dtype = self.unet.conv_in.weight.dtype
        inputs = latents.to(dtype)
        if given.planes is not None:
            inputs = _concatenated(inputs, given.planes.to(dtype))
        tokens = None if given.tokens is None else given.tokens.to(dtype)
        return self.unet(inputs, timesteps, tokens, given.mask).to(latents.dtype)

    def _embed(self, inputs: Inputs, latents: Tensor) -> Condition:
        if self.conditioner is None:
            raise ValueError("inputs need a conditioner that is trained: embed them first")
        height, width = latents.shape[-2:]
        return self.conditioner(inputs, (height, width))


def _concatenated(latents: Tensor, planes: Tensor) -> Tensor:
    """Concatenate [B, C, h, w], [B, C', h, w] → [B, C + C', h, w] in the latents' memory layout."""
    last = latents.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.cat([latents, planes], dim=1).contiguous(memory_format=layout)
