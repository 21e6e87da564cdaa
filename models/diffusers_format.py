"""Conversion of our networks to parts of diffusers' StableDiffusionPipeline: JSON and tensors.

The tensors of the U-Net and the first stage have diffusers' names already. Conditioners convert
themselves (`Conditioner.pipeline_parts`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.conditioning.conditioner import PipelinePart
from models.config import (
    AutoencoderConfig,
    AutoencoderKind,
    DiffusionConfig,
    NoiseSchedule,
    SamplerConfig,
    UNetConfig,
)
from models.config.sampling import SAMPLERS

PIPELINE_INDEX = "model_index.json"
DIFFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Weights of the U-Net, and of the first stage in another folder."""

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
SCHEDULES = {
    NoiseSchedule.scaled_linear: "scaled_linear",
    NoiseSchedule.linear: "linear",
    NoiseSchedule.cosine: "squaredcos_cap_v2",
}
SAME_UNET = {
    "attention_head_dim": "heads",
    "norm_num_groups": "norm_groups",
    "transformer_layers_per_block": "transformer_depth",
    "use_linear_projection": "linear_projection",
}
"""Options in an export's U-Net that the shapes of its tensors do not show."""
SAME_SCHEDULER = {
    "num_train_timesteps": "num_timesteps",
    "beta_schedule": "schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "prediction_type": "prediction_type",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}
"""Options in an export's scheduler that are of the diffusion, not of the sampler."""


def export_differences(
    unet: UNetConfig,
    diffusion: DiffusionConfig,
    their_unet: Mapping[str, Any],
    their_scheduler: Mapping[str, Any],
) -> Iterator[str]:
    """Yield a line for each option that differs from that of an export, by config path.

    their_unet, their_scheduler: config.json of an export's U-Net and scheduler_config.json.
    """
    heads = their_unet.get("attention_head_dim")
    if isinstance(heads, int):
        their_unet = {**their_unet, "attention_head_dim": [heads] * len(unet.heads)}
    their_scheduler = {"rescale_betas_zero_snr": False, **their_scheduler}
    for section, own, names, theirs in (
        ("unet", unet, SAME_UNET, their_unet),
        ("diffusion", diffusion, SAME_SCHEDULER, their_scheduler),
    ):
        for key, name in names.items():
            value = getattr(own, name)
            if isinstance(value, NoiseSchedule):
                value = SCHEDULES.get(value, value.value)
            if theirs.get(key, value) != value:
                yield f"{section}.{name} is {value}, that of the export is {theirs[key]}"


def pipeline_index(parts: Mapping[str, PipelinePart]) -> str:
    """Return the content of model_index.json, which names the class of every part."""
    classes = {name: [part.library, part.kind] for name, part in parts.items()}
    return _json(PIPELINE | classes)


def diffusers_part(
    config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> PipelinePart:
    """Build a part of the library diffusers: a network or, without weights, a scheduler.

    config: its JSON, from `unet_config`, `autoencoder_config` or `scheduler_config`; weights:
    tensors by diffusers' names.
    """
    name = "scheduler_config.json" if weights is None else "config.json"
    return PipelinePart(
        library="diffusers",
        kind=config["_class_name"],
        texts={name: _json(config)},
        tensors={} if weights is None else {DIFFUSION_WEIGHTS: weights},
    )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def unet_config(config: UNetConfig, latent_side: int) -> dict[str, Any]:
    """Return config.json of UNet2DConditionModel.

    latent_side: of the latents in training, in pixels.

    Raises: ValueError naming an option that diffusers does not have.
    """
    for option in ("resblock_updown", "add_context"):
        if getattr(config, option):
            raise ValueError(f"unet.{option}: diffusers' pipeline has no such U-Net")
    if config.in_channels != config.out_channels:
        raise ValueError("unet.in_channels: diffusers' pipeline concatenates nothing to latents")
    names = ["CrossAttn" if attends else "" for attends in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latent_side,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        **_levels(config, names, down="DownBlock2D", up="UpBlock2D"),
        "attention_head_dim": list(config.heads),  # the number of heads, in diffusers' terms
        "transformer_layers_per_block": config.transformer_depth,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }


def _levels(
    config: UNetConfig | AutoencoderConfig, names: Sequence[str], *, down: str, up: str
) -> dict[str, Any]:
    """Return the options of the levels; a block's type is its level's name and `down` or `up`."""
    return {
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [f"{name}{down}" for name in names],
        "up_block_types": [f"{name}{up}" for name in reversed(names)],
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
    }


def autoencoder_config(config: AutoencoderConfig, image_side: int) -> dict[str, Any]:
    """Return config.json of AutoencoderKL.

    image_side: of the images in training, in pixels.

    Raises: ValueError for a first stage that is no AutoencoderKL.
    """
    if config.kind is AutoencoderKind.identity:
        raise ValueError(
            "autoencoder.kind=identity: diffusers' pipeline needs a first stage, and none of its "
            "own leaves pixels as they are; draw with trainer.sample"
        )
    if config.kind is not AutoencoderKind.kl:
        raise ValueError(
            "autoencoder.kind=vq: the nearest codes of scaled latents are others, so diffusers' "
            "pipeline cannot decode them; only kl can be exported"
        )
    levels = range(len(config.block_out_channels))
    names = ["Attn" if level in config.attention_levels else "" for level in levels]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": image_side,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        **_levels(config, names, down="DownEncoderBlock2D", up="UpDecoderBlock2D"),
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def scaled_autoencoder(
    weights: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """Put the normalisation of latents into the weights of AutoencoderKL.

    diffusers scales all channels by one number. The 1x1 convolutions quant_conv and post_quant_conv
    can scale and shift each channel instead. mean, std: of each latent channel, [C].
    """
    scaled = dict(weights)
    means, stds = torch.tensor(mean), torch.tensor(std)
    shift = torch.cat([means, 2 * stds.log()])  # mean, then log-variance
    divisor = torch.cat([stds, torch.ones_like(stds)])
    scaled["quant_conv.weight"] = weights["quant_conv.weight"] / divisor.view(-1, 1, 1, 1)
    scaled["quant_conv.bias"] = (weights["quant_conv.bias"] - shift) / divisor
    kernel = weights["post_quant_conv.weight"]
    scaled["post_quant_conv.weight"] = kernel * stds.view(1, -1, 1, 1)
    scaled["post_quant_conv.bias"] = weights["post_quant_conv.bias"] + kernel[:, :, 0, 0] @ means
    return scaled


def scheduler_config(diffusion: DiffusionConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """Return scheduler_config.json of diffusers' scheduler that equals our sampler.

    Raises: ValueError naming the options for which diffusers has no scheduler.
    """
    if diffusion.schedule not in SCHEDULES:
        raise ValueError(
            f"diffusion.schedule={diffusion.schedule}: diffusers' pipeline samples only from "
            f"{', '.join(SCHEDULES)}"
        )
    scheduler = SAMPLERS[sampler.name].scheduler
    if scheduler is None:
        raise ValueError(
            f"sampler.name={sampler.name}: diffusers has no such scheduler; export with "
            f"sampler=ddim or sampler=dpmpp_2m"
        )
    if diffusion.zero_terminal_snr and not scheduler.knows_pure_noise:
        raise ValueError(
            f"sampler.name={sampler.name}: diffusers' scheduler does not know "
            f"diffusion.zero_terminal_snr; export with sampler=ddim or sampler=dpmpp_2m"
        )
    options = dict(scheduler.options)
    if scheduler.knows_pure_noise:
        options["rescale_betas_zero_snr"] = diffusion.zero_terminal_snr
    return {
        "_class_name": scheduler.name,
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": diffusion.prediction_type.value,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # no effect with this spacing, but the pipeline requires it
        **options,
    }
