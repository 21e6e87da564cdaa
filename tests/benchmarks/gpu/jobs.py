"""The job of the rows about the trainer: `+experiment=laion_512` on pictures made of noise."""

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.full_training import CLIP, overrides_for
from tests.benchmarks.gpu.setting import Setting
from tests.support.latent_jobs import TINY
from trainer.cli import load_config
from trainer.config import Config

STEPS, STOP_AT = 12, 6
SMALL_WIDTH = 32
"""Of text tokens in the small form."""
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"width": SMALL_WIDTH, "heads": 2, "layers": 2},
}
SMALL_NETWORK = [
    "unet.block_out_channels=[16,32]",
    "unet.layers_per_block=1",
    "unet.attention=[false,true]",
    "unet.heads=[1,2]",
    "unet.norm_groups=8",
]
SMALL = [
    *TINY,
    *SMALL_NETWORK,
    f"unet.context_dim={SMALL_WIDTH}",
    f"conditioner.width={SMALL_WIDTH}",
]


def clip_of(setting: Setting) -> dict[str, Any]:
    """A text tower of two layers: the trainer's text is stored."""
    return SMALL_CLIP if setting.small else CLIP


def samples_of(setting: Setting) -> int:
    return 8 if setting.small else 256


def words_of(setting: Setting, run: str, *more: str) -> list[str]:
    """The command line of a training into the run folder of this name."""
    batch = 4 if setting.small else 16
    words = [
        *overrides_for(setting.folder),
        f"run.dir={setting.folder / run}",
        "unet.gradient_checkpointing=false",
        f"train.precision={'bf16' if setting.on_gpu else 'fp32'}",
        f"precompute.precision={'bf16' if setting.on_gpu else 'fp32'}",
        f"train.micro_batch_size={batch}",
        f"train.global_batch_size={2 * batch if setting.small else 4 * batch}",
        f"train.max_steps={2 if setting.small else STEPS}",
        f"checkpoint.every={10 * STEPS}",
    ]
    if setting.small:
        return [*words, *SMALL, *more]
    return [*words, "precompute.batch_size=64", "precompute.workers=8", *more]


def config_of(setting: Setting, run: str, *more: str) -> Config:
    return load_config(words_of(setting, run, *more))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(folder)]
