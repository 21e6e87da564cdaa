"""Precomputing latents, and the text tower of Stable Diffusion 2."""

import json
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.conditioning.text import Text
from models.first_stage.autoencoder import load_autoencoder
from tests.benchmarks.full_training import write_clip
from tests.benchmarks.gpu.jobs import SMALL_CLIP, clip_of, config_of, samples_of
from tests.benchmarks.gpu.setting import Setting
from tests.support.latent_jobs import write_first_stage, write_pictures
from trainer.precompute.job import precompute

CAPTIONS = 64
VIT_H: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"width": 1024, "heads": 16, "layers": 24},
}


def measure(setting: Setting) -> None:
    """Note the speed of the whole command, and of the encoder alone; later rows train on this."""
    config, samples = config_of(setting, "run"), samples_of(setting)
    write_clip(setting.folder, clip_of(setting))
    write_first_stage(Path(config.autoencoder.weights), config)
    write_pictures(Path(config.data.train), samples, samples // 2, config.data.image_size)
    setting.begin_peak()
    start_s = time.perf_counter()
    precompute(config)
    spent_s = time.perf_counter() - start_s
    setting.note("img_per_s", samples / spent_s)
    setting.note("peak_gib", setting.peak_gib()[0])
    batch, size = config.precompute.batch_size, config.data.image_size
    stage = load_autoencoder(config.autoencoder).to(setting.device, setting.dtype)
    images = torch.randn(batch, 3, size, size, device=setting.device, dtype=setting.dtype)
    with torch.inference_mode():
        (encode_s,) = setting.median_s(lambda: stage.encode(images))
    setting.note("encoder_img_per_s", batch / encode_s)
    setting.note("encoder_pct", 100 * encode_s / batch * samples / spent_s)


def measure_text(setting: Setting) -> None:
    """Note milliseconds a caption in each precision."""
    config = config_of(setting, "run")
    model, weights = setting.folder / "text.json", setting.folder / "text.safetensors"
    described = SMALL_CLIP if setting.small else VIT_H
    model.write_text(json.dumps(described))
    save_file(open_clip.CLIP(**described).state_dict(), weights)
    config.conditioner.model, config.conditioner.pretrained = str(model), str(weights)
    tower = build_conditioner(config.conditioner).to(setting.device)
    assert isinstance(tower, Text)
    captions = [f"a picture of the number {number}" for number in range(CAPTIONS)]

    def note(name: str) -> None:
        with torch.inference_mode():
            (spent_s,) = setting.median_s(lambda: tower.condition(Given(captions), (1, 1)))
        setting.note(name, 1000 * spent_s / CAPTIONS)

    note("fp32_ms")
    torch.backends.cuda.matmul.allow_tf32 = True
    note("tf32_ms")
    tower.run_in(torch.bfloat16)
    note("bf16_ms")
