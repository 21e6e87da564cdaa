"""From prompts to images: the trained network with everything that sampling needs around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from models.attention import Context
from models.autoencoder import Autoencoder, load_autoencoder
from models.conditioners import Captions, Conditioner, build_conditioner
from models.convert import load_unet
from models.diffusers_format import DIFFUSION_WEIGHTS, PIPELINE_INDEX
from models.diffusion import Diffusion
from models.guidance import guided
from models.samplers import sample
from models.unet import UNet2DCondition
from trainer import rng
from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.images import to_uint8
from trainer.rng import Purpose


@dataclass(frozen=True, slots=True)
class LatentScale:
    """Mean and standard deviation of every latent channel over the whole training set."""

    mean: list[float]
    std: list[float]

    def normalise(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w] as the first stage gives them → mean 0 and variance 1 a channel."""
        return (latents - _channels(self.mean, latents)) / _channels(self.std, latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of normalise."""
        return latents * _channels(self.std, latents) + _channels(self.mean, latents)


class LatentDiffusion(nn.Module):
    """All that is trained: the U-Net and, where it learns too, the conditioner."""

    def __init__(self, unet: UNet2DCondition, conditioner: Conditioner | None) -> None:
        """conditioner: the one that is trained with the U-Net, if there is one."""
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Context | Captions | None
    ) -> Tensor:
        """Predict with the U-Net in its own precision.

        latents: [B, C, h, w] noisy, normalised; timesteps: [B]; condition: the context, or the
        captions that the trained conditioner embeds.
        Returns [B, C, h, w] in the latents' dtype.
        """
        if self.conditioner is not None and not isinstance(condition, Context):
            condition = self.conditioner(condition)
        dtype = self.unet.conv_in.weight.dtype
        tokens, mask = None, None
        if condition is not None:
            assert isinstance(condition, Context)
            tokens, mask = condition.tokens.to(dtype), condition.mask
        return self.unet(latents.to(dtype), timesteps, tokens, mask).to(latents.dtype)


def load_trained(
    config: Config, checkpoint: Checkpoint, conditioner: Conditioner
) -> tuple[LatentDiffusion, LatentScale]:
    """The averaged weights of a checkpoint, and the scale of the latents that it was trained on.

    Raises: ValueError if the checkpoint is of another task or network than the config's.
    """
    if "latent_scale" not in checkpoint.state["task"]:
        raise ValueError(f"checkpoint.load: {checkpoint.path} is not of task=diffusion")
    trained = conditioner if conditioner.trainable else None
    module = LatentDiffusion(UNet2DCondition(config.unet), trained)
    try:
        module.load_state_dict(checkpoint.average(config.ema.use)[1])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint.load: {checkpoint.path} holds another network than unet.* describes"
        ) from error
    return module, LatentScale(**checkpoint.state["task"]["latent_scale"])


class Pipeline:
    """Draws images; sample i's noise is a function of (seed, i), whatever the batches and ranks."""

    def __init__(
        self,
        config: Config,
        module: LatentDiffusion,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        scale: LatentScale,
        device: torch.device,
    ) -> None:
        self._config = config
        self._module = module.to(device).eval()
        self._conditioner = conditioner.to(device).eval()
        self._autoencoder = autoencoder.to(device).eval()
        self._diffusion = Diffusion(config.diffusion)
        self._scale = scale
        self._device = device

    @classmethod
    def load(cls, config: Config, checkpoint: Checkpoint, device: torch.device) -> Self:
        """Of a checkpoint's averaged weights.

        Raises: ValueError if the checkpoint is of another task or network than the config's.
        """
        conditioner = build_conditioner(config.conditioner)
        module, scale = load_trained(config, checkpoint, conditioner)
        return cls(config, module, conditioner, load_autoencoder(config.autoencoder), scale, device)

    @classmethod
    def load_export(cls, config: Config, folder: Path, device: torch.device) -> Self:
        """Of the U-Net and first stage of an export; the conditioner is the config's.

        Raises: FileNotFoundError or ValueError if they are missing, or of another network than the
        config's.
        """
        if not (folder / PIPELINE_INDEX).is_file():
            raise FileNotFoundError(
                f"sample.export: {folder} holds no {PIPELINE_INDEX}; make an export with "
                f"python -m trainer.export +experiment={config.run.experiment}"
            )
        unet = UNet2DCondition(config.unet)
        load_unet(unet, config.unet, folder / "unet" / DIFFUSION_WEIGHTS)
        stage = replace(config.autoencoder, weights=str(folder / "vae" / DIFFUSION_WEIGHTS))
        autoencoder = load_autoencoder(stage)
        channels = config.autoencoder.latent_channels
        scale = LatentScale([0.0] * channels, [1.0] * channels)  # it is part of an export's weights
        module = LatentDiffusion(unet, None)
        return cls(
            config, module, build_conditioner(config.conditioner), autoencoder, scale, device
        )

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        seed: int,
        on_step: Callable[[int, Tensor], None] | None = None,
        *,
        negative_prompt: str | None = None,
        init_image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Images [B, 3, H, W] uint8 on the CPU of B prompts, from the noise of `samples`.

        init_image: [3, H, W] in [-1, 1], which all of them start from with this strength; see
        `models.samplers.sample`.
        """
        config = self._config
        side = config.data.image_size // config.autoencoder.downsample_factor
        shape = (config.unet.in_channels, side, side)
        ids = np.asarray(samples, np.int64)

        def noise(purpose: Purpose, draw: int) -> Tensor:
            epochs = np.full_like(ids, draw)
            return torch.from_numpy(rng.normal(seed, purpose, epochs, ids, shape)).to(self._device)

        predict = guided(
            self._module,
            self._conditioner(list(prompts)),
            self._conditioner([negative_prompt] * len(ids)),
            config.sampler,
        )
        start = None if init_image is None else self._encode(init_image)
        latents = sample(
            predict,
            self._diffusion,
            config.sampler,
            noise(Purpose.sampling, 0),
            start=start,
            strength=strength,
            step_noise=lambda step: noise(Purpose.sampler_step, step),
            on_step=on_step,
        )
        return to_uint8(self._autoencoder.decode(self._scale.denormalise(latents)))

    def _encode(self, image: Tensor) -> Tensor:
        """[3, H, W] → the mean of its posterior, normalised: [1, C, h, w]."""
        mean = self._autoencoder.encode(image[None].to(self._device))[:, 0]
        return self._scale.normalise(mean)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
