"""From prompts to images: the trained network, its conditioner, first stage and sampler."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from data.storage.documents import is_json_object, read_json
from models.conditioning.conditioner import Conditioner, Size
from models.conditioning.conditioners import build_conditioner, conditioner_class
from models.conditioning.given import Given
from models.conditioning.text import Text, same_weights, text_fingerprint
from models.diffusers_format import DIFFUSION_WEIGHTS, PIPELINE_INDEX, export_differences
from models.diffusion.guidance import guided
from models.diffusion.process import Diffusion
from models.diffusion.samplers import Start, sample
from models.first_stage.autoencoder import AutoencoderVQ, fingerprint, load_autoencoder
from models.first_stage.first_stage import FirstStage
from models.first_stage.memory import activation_bytes
from models.latent_diffusion import LatentDiffusion, LatentScale, encode_normalised
from models.layers.attention import sdpa_for
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from models.weights.compvis import load_unet
from trainer.checkpoints.reader import Checkpoint
from trainer.config import Config
from trainer.pictures.png import from_uint8, to_uint8
from trainer.runtime import rng
from trainer.runtime.devices import inference_dtype
from trainer.runtime.rng import Purpose
from trainer.runtime.slices import slice_size

FIRST_STAGE, TEXT_ENCODER = "first_stage", "text_encoder"
"""Keys of the hashes of frozen networks in the task's state of a checkpoint."""


def load_trained(
    config: Config, checkpoint: Checkpoint, conditioner: Conditioner
) -> tuple[LatentDiffusion, LatentScale]:
    """Load the averaged weights of a checkpoint.

    conditioner: it gets its averaged weights, if it was trained with the U-Net.
    Returns the network on the CPU, and the mean and standard deviation of its training latents.
    Raises: ValueError if the checkpoint is of another task or network than the config's, or was
    trained with another text encoder than `conditioner`.
    """
    if "latent_scale" not in checkpoint.state.task:
        raise ValueError(f"checkpoint.load: {checkpoint.path} is not of task=diffusion")
    _check_text_encoder(config, checkpoint, conditioner)
    trained = conditioner if conditioner.trainable else None
    module = LatentDiffusion(UNet2DCondition(config.unet), trained)
    try:
        module.load_state_dict(checkpoint.average(config.ema.use)[1])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint.load: {checkpoint.path} holds another network than unet.* describes"
        ) from error
    return module, LatentScale(**checkpoint.state.task["latent_scale"])


def load_decoder(config: Config, checkpoint: Checkpoint) -> FirstStage:
    """Load the first stage of the config; a line says if a checkpoint was trained with another.

    Raises: FileNotFoundError or ValueError that names autoencoder.weights.
    """
    autoencoder = load_autoencoder(config.autoencoder)
    saved = checkpoint.state.task.get(FIRST_STAGE)  # 0.1.0 did not save it
    if saved is not None and saved != fingerprint(autoencoder):
        print(
            f"warning: {checkpoint.path} was trained on latents of another first stage than "
            f"autoencoder.weights={config.autoencoder.weights}",
            file=sys.stderr,
            flush=True,
        )
    return autoencoder


def _check_export(config: Config, folder: Path) -> None:
    """Compare network and diffusion of the config with those of an export.

    Raises: ValueError in one line with both values of each option that differs, or for a kind of
    conditioner whose weights no export has.
    """
    if conditioner_class(config.conditioner).trainable:
        raise ValueError(
            f"sample.export: no export has weights of conditioner.kind={config.conditioner.kind}: "
            "draw from the checkpoint"
        )
    theirs: list[dict[str, Any]] = []
    for path in (folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"):
        try:
            content: object = read_json(path, below=folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"sample.export: {path} cannot be read: {error}") from error
        theirs.append(content if is_json_object(content) else {})
    found = "; ".join(export_differences(config.unet, config.diffusion, *theirs))
    if found:
        raise ValueError(f"sample.export: {folder} is of another model: {found}")


def _check_text_encoder(config: Config, checkpoint: Checkpoint, conditioner: Conditioner) -> None:
    """Compare a text encoder under another name than in training by its hash.

    Raises: ValueError with both names, if it is another.
    """
    saved = checkpoint.state.task.get(TEXT_ENCODER)
    trained, own = checkpoint.state.config["conditioner"], config.conditioner
    names = [(trained["model"], trained["pretrained"]), (own.model, own.pretrained)]
    if saved is None or names[0] == names[1] or not isinstance(conditioner, Text):
        return
    if not same_weights(text_fingerprint(conditioner), saved):
        old, new = (" of ".join(filter(None, reversed(name))) for name in names)
        raise ValueError(
            f"checkpoint.load: {checkpoint.path} was trained with another text encoder: "
            f"conditioner.pretrained was {old}, is {new}"
        )


def cast_networks(config: Config, device: torch.device, *networks: nn.Module) -> None:
    """Cast networks that draw to the precision of the training, for good; on a CPU to fp32.

    A text encoder beside stored text keeps fp32, in which the text was made, and so does a first
    stage with a codebook: in bf16, latents would be nearest to other codes.
    """
    dtype = inference_dtype(device, config.train.precision)
    for network in networks:
        if isinstance(network, Text):
            if not config.data.store_text:
                network.run_in(dtype)
        elif not isinstance(network, AutoencoderVQ):
            network.to(dtype)


class Pipeline:
    """Draws images. The noise of sample i depends on (seed, i), not on batches or ranks.

    The sampler's state is fp32, whatever the precision of the networks. The constructor does not
    move its networks or cast them. The caller casts them (`cast_networks`) and puts them on the
    device, in evaluation mode, for good or by `runtime.placement.on_device`. `load` and
    `load_export` do this themselves.
    """

    def __init__(
        self,
        config: Config,
        module: LatentDiffusion,
        conditioner: Conditioner,
        autoencoder: FirstStage,
        scale: LatentScale,
        device: torch.device,
    ) -> None:
        """device: the device of the networks.

        scale: the mean and standard deviation of the latents that the U-Net was trained on.
        """
        self._config = config
        self._module = module
        use_attention(module, sdpa_for(device))  # a training chooses for its own precision
        self._autoencoder = autoencoder
        self._diffusion = Diffusion(config.diffusion)
        self._scale = scale.to(device)
        self._device = device
        self.conditioner = conditioner

    @classmethod
    def load(cls, config: Config, checkpoint: Checkpoint, device: torch.device) -> Self:
        """Load a checkpoint's averaged weights, the conditioner and the first stage.

        Raises: FileNotFoundError or ValueError that names the config path of missing weights;
        ValueError if the checkpoint is of another task or network than the config's.
        """
        conditioner = build_conditioner(config.conditioner)
        module, scale = load_trained(config, checkpoint, conditioner)
        autoencoder = load_decoder(config, checkpoint)
        _place(config, device, module, conditioner, autoencoder)
        return cls(config, module, conditioner, autoencoder, scale, device)

    @classmethod
    def load_export(cls, config: Config, folder: Path, device: torch.device) -> Self:
        """Load the U-Net and the first stage of an export, and the conditioner of the config.

        Raises: FileNotFoundError or ValueError if weights are missing, or are of another network or
        diffusion than the config's.
        """
        if not (folder / PIPELINE_INDEX).is_file():
            raise FileNotFoundError(
                f"sample.export: {folder} holds no {PIPELINE_INDEX}; make an export with "
                f"python -m trainer.export +experiment={config.run.experiment}"
            )
        _check_export(config, folder)
        unet = UNet2DCondition(config.unet)
        load_unet(unet, config.unet, folder / "unet" / DIFFUSION_WEIGHTS)
        stage = replace(config.autoencoder, weights=str(folder / "vae" / DIFFUSION_WEIGHTS))
        autoencoder = load_autoencoder(stage)
        channels = config.autoencoder.latent_channels
        # no scale: an export has it in the weights of its first stage
        scale = LatentScale([0.0] * channels, [1.0] * channels)
        module, conditioner = LatentDiffusion(unet, None), build_conditioner(config.conditioner)
        _place(config, device, module, conditioner, autoencoder)
        return cls(config, module, conditioner, autoencoder, scale, device)

    @torch.inference_mode()
    def draw(
        self,
        given: Given,
        samples: Sequence[int],
        seed: int,
        on_step: Callable[[int, Tensor], None] | None = None,
        *,
        size: Size | None = None,
        negative_prompt: str | None = None,
        init_image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Draw an image of each condition: [B, 3, H, W] uint8 on the CPU.

        given: what B samples give for their condition. samples: [B] numbers of the samples; with
        `seed` they determine the noise.
        on_step: called after each sampling step with its index and the predicted clean latents,
        [B, C, h, w].
        size: (H, W) in pixels, as `trainer.checks` allows them; None: data.image_size.
        negative_prompt: the prompt of the unconditional prediction; None: the empty condition.
        init_image: [3, H, W] of this size in [-1, 1], the start of all images. strength: the share
        of the sampling steps that are done from there, in (0, 1]
        (`models.diffusion.samplers.sample`).
        """
        config = self._config
        side = config.data.image_size
        height, width = self.latent_size(size or (side, side))
        shape = (config.autoencoder.latent_channels, height, width)
        ids = np.asarray(samples, np.int64)

        def noise(purpose: Purpose, draw: int) -> Tensor:
            epochs = np.full_like(ids, draw)
            return torch.as_tensor(rng.normal(seed, purpose, epochs, ids, shape)).to(self._device)

        condition = null = self.conditioner.condition(given, (height, width), self._encode)
        if config.sampler.guidance_scale != 1.0:
            negative = given.with_captions([negative_prompt] * len(ids))
            null = self.conditioner.condition(negative, (height, width), self._encode)
        predict = guided(self._module, condition, null, config.sampler)
        start = None if init_image is None else Start(self._encode(init_image[None]), strength)
        latents = sample(
            predict,
            self._diffusion,
            config.sampler,
            noise(Purpose.sampling, 0),
            start=start,
            step_noise=lambda step: noise(Purpose.sampler_step, step),
            on_step=on_step,
        )
        return self.conditioner.paste(self._decode(self._scale.denormalise(latents)), given)

    def latent_size(self, size: Size) -> Size:
        """Return (h, w) of the latents of an image of (H, W) pixels."""
        factor = self._config.autoencoder.downsample_factor
        return size[0] // factor, size[1] // factor

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images [B, 3, H, W] in [-1, 1]; return them on the CPU, in 8 bits."""
        drawn = self._decode(self._scale.denormalise(self._encode(images)))
        return from_uint8(drawn)

    def _encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] to the normalised means of their posteriors: [B, C, h, w]."""
        return encode_normalised(self._autoencoder, self._scale, images.to(self._device))

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] in slices: [B, 3, H, W] uint8 on the CPU."""
        config, dtype = self._config, self._autoencoder.dtype
        height, width = latents.shape[-2:]
        pixels = height * width * config.autoencoder.downsample_factor**2
        each = activation_bytes(config.autoencoder, pixels, dtype.itemsize)
        parts = torch.split(latents.to(dtype), slice_size(each, self._device))
        return torch.cat([to_uint8(self._autoencoder.decode(part).float()) for part in parts])


def _place(config: Config, device: torch.device, *networks: nn.Module) -> None:
    """Cast networks, and move them to the device, in evaluation mode."""
    cast_networks(config, device, *networks)
    for network in networks:
        network.to(device).eval()
