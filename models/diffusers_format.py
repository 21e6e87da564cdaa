"""Our networks as the parts of diffusers' StableDiffusionPipeline: config JSON and tensors.

The tensors of U-Net and first stage have diffusers' names already; the text encoder's are renamed
to those of transformers' CLIPTextModel.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from models.conditioners import ClipText
from models.config import (
    AutoencoderConfig,
    AutoencoderKind,
    DiffusionConfig,
    NoiseSchedule,
    SamplerConfig,
    SamplerName,
    TextFeatures,
    UNetConfig,
)

PIPELINE_INDEX = "model_index.json"
DIFFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Of the U-Net and of the first stage, each in a folder of its own."""

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
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
SCHEDULERS: dict[SamplerName, tuple[str, dict[str, Any]]] = {
    SamplerName.ddim: ("DDIMScheduler", {"clip_sample": False}),
    SamplerName.plms: ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    SamplerName.euler: ("EulerDiscreteScheduler", {}),
    SamplerName.euler_ancestral: ("EulerAncestralDiscreteScheduler", {}),
    SamplerName.heun: ("HeunDiscreteScheduler", {}),
    SamplerName.dpmpp_2m: ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    SamplerName.unipc: ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
}
NEVER_PURE_NOISE = (SamplerName.plms, SamplerName.heun)
"""Samplers whose scheduler does not know zero_terminal_snr."""

TEXT_OPTIONS = {"context_length", "vocab_size", "width", "heads", "layers", "quick_gelu"}
"""What CLIPTextModel has in common with open_clip's text tower."""
TEXT_RULES = [
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^ln_final\.", "final_layer_norm."),
]
START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"


def unet_config(config: UNetConfig, latent_side: int) -> dict[str, Any]:
    """config.json of UNet2DConditionModel. latent_side: of the latents trained on, in pixels.

    Raises ValueError, naming the option, for a network that diffusers does not have.
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
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [f"{name}DownBlock2D" for name in names],
        "up_block_types": [f"{name}UpBlock2D" for name in reversed(names)],
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": list(config.heads),  # diffusers' name for their number
        "transformer_layers_per_block": config.transformer_depth,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "norm_num_groups": config.norm_groups,
    }


def autoencoder_config(config: AutoencoderConfig, image_side: int) -> dict[str, Any]:
    """config.json of AutoencoderKL. image_side: of the images trained on, in pixels.

    Raises ValueError for a first stage that is no AutoencoderKL.
    """
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
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [f"{name}DownEncoderBlock2D" for name in names],
        "up_block_types": [f"{name}UpDecoderBlock2D" for name in reversed(names)],
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def scaled_autoencoder(
    weights: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """Weights of AutoencoderKL that encode to, and decode from, latents scaled a channel.

    diffusers scales by one number; the 1x1 convolutions beside the latents can hold the rest.
    mean, std: of each latent channel.
    """
    scaled = dict(weights)
    means, stds = torch.tensor(mean), torch.tensor(std)
    shift = torch.cat([means, 2 * stds.log()])  # of the mean, and of the log-variance
    divisor = torch.cat([stds, torch.ones_like(stds)])
    scaled["quant_conv.weight"] = weights["quant_conv.weight"] / divisor.view(-1, 1, 1, 1)
    scaled["quant_conv.bias"] = (weights["quant_conv.bias"] - shift) / divisor
    kernel = weights["post_quant_conv.weight"]
    scaled["post_quant_conv.weight"] = kernel * stds.view(1, -1, 1, 1)
    scaled["post_quant_conv.bias"] = weights["post_quant_conv.bias"] + kernel[:, :, 0, 0] @ means
    return scaled


def scheduler_config(diffusion: DiffusionConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """scheduler_config.json of the scheduler that does what our sampler does.

    Raises ValueError, naming the options, where there is none.
    """
    if diffusion.schedule not in SCHEDULES:
        raise ValueError(
            f"diffusion.schedule={diffusion.schedule}: diffusers' pipeline samples only from "
            f"{', '.join(SCHEDULES)}"
        )
    if diffusion.zero_terminal_snr and sampler.name in NEVER_PURE_NOISE:
        raise ValueError(
            f"sampler.name={sampler.name}: diffusers' scheduler does not know "
            f"diffusion.zero_terminal_snr; export with sampler=ddim or sampler=dpmpp_2m"
        )
    name, options = SCHEDULERS[sampler.name]
    if sampler.name not in NEVER_PURE_NOISE:
        options = options | {"rescale_betas_zero_snr": diffusion.zero_terminal_snr}
    return {
        "_class_name": name,
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": diffusion.prediction_type.value,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # of no effect on this spacing, but the pipeline wants it
        **options,
    }


def text_encoder_config(text: ClipText) -> dict[str, Any]:
    """config.json of CLIPTextModel.

    Raises ValueError for a text tower that transformers' CLIP does not have.
    """
    if text.features is TextFeatures.pooled:
        raise ValueError("conditioner.features=pooled: diffusers' pipeline attends to all tokens")
    options, tokenizer = text.architecture, cast("Any", text.tokenizer)
    if unknown := sorted(options.keys() - TEXT_OPTIONS):
        raise ValueError(
            f"conditioner.model: transformers' CLIPTextModel has no {', '.join(unknown)}"
        )
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": options["vocab_size"],
        "hidden_size": options["width"],
        "intermediate_size": 4 * options["width"],
        "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"] - (text.features is TextFeatures.penultimate),
        "max_position_embeddings": options["context_length"],
        "hidden_act": "quick_gelu" if options["quick_gelu"] else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.encoder["<start_of_text>"],
        "eos_token_id": tokenizer.encoder["<end_of_text>"],
        "pad_token_id": 0,
    }


def text_encoder_weights(text: ClipText) -> dict[str, Tensor]:
    """Tensors of CLIPTextModel; without the last block where the conditioner skips it."""
    tower = getattr(text.clip, "text", text.clip)
    without_last = text.features is TextFeatures.penultimate
    skipped = f"encoder.layers.{text.architecture['layers'] - 1}." if without_last else None
    found: dict[str, Tensor] = {}
    for name, tensor in tower.state_dict().items():
        if name in ("logit_scale", "logit_bias", "text_projection"):
            continue
        for pattern, replacement in TEXT_RULES:
            name = re.sub(pattern, replacement, name)
        if skipped and name.startswith(skipped):
            continue
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split = name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")
                found[f"text_model.{split}"] = part.contiguous()
        else:
            found[f"text_model.{name}"] = tensor
    return found


def tokenizer_files(text: ClipText) -> dict[str, str]:
    """Text of each file of CLIPTokenizer, by its name."""
    special = {"<start_of_text>": START, "<end_of_text>": END}
    tokenizer: Any = text.tokenizer
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    # open_clip pads with 0, which is "!" as well; as a name of its own it is not found in captions
    vocabulary[PADDING] = 0
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": PADDING,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(options, indent=2),
    }
