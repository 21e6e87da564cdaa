"""The path of an evaluation: guided drawing and decoding, without networks of features."""

from collections.abc import Callable
from typing import Any

import torch

from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.first_stage.autoencoder import load_autoencoder
from models.latent_diffusion import LatentDiffusion, LatentScale
from models.unet import UNet2DCondition
from tests.benchmarks.gpu.jobs import config_of
from tests.benchmarks.gpu.setting import GIB, Setting
from trainer.pipeline import Pipeline, cast_networks

IMAGES, STEPS = 64, 4
SLICES = (8, 16, 64)


def measure(setting: Setting) -> None:
    """Note memory above the weights', and seconds."""
    config = config_of(setting, "run", f"sampler.steps={STEPS}", "sampler.guidance_scale=5")
    images = 2 if setting.small else IMAGES
    stage, conditioner = load_autoencoder(config.autoencoder), build_conditioner(config.conditioner)
    module = LatentDiffusion(UNet2DCondition(config.unet), None)
    networks = (module, stage, conditioner)
    for network in networks:
        network.to(setting.device).eval()
    channels = config.autoencoder.latent_channels
    side = config.data.image_size // config.autoencoder.downsample_factor
    latents = torch.randn(SLICES[-1], channels, side, side, device=setting.device)
    prompts, numbers = [f"a {number}" for number in range(images)], range(images)
    scale = LatentScale([0.0] * channels, [1.0] * channels)
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        if dtype is torch.bfloat16:
            cast_networks(config, setting.device, *networks)
            stage.to(dtype)
        for size in SLICES:
            part = latents[:size].to(dtype)
            note_peak(setting, f"decode_{size}_{name}", lambda part=part: stage.decode(part))
        pipeline = Pipeline(config, module, conditioner, stage, scale, setting.device)
        note_peak(
            setting,
            f"draw_{name}",
            lambda pipeline=pipeline: pipeline.draw(Given(prompts), numbers, seed=0),
        )


def note_peak(setting: Setting, name: str, call: Callable[[], Any]) -> None:
    """Run it once."""
    before = torch.cuda.memory_allocated(setting.device) / GIB if setting.on_gpu else 0.0
    setting.begin_peak()
    try:
        with torch.inference_mode():
            setting.note(f"{name}_s", setting.seconds(call))
    except torch.OutOfMemoryError:
        setting.note(f"{name}_s", "out of memory")
    else:
        setting.note(f"{name}_gib", setting.peak_gib()[0] - before)
