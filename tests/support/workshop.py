"""Small real data and small real networks that every level of the tests shares."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainer.cli import load_config
from trainer.config import Config
from trainer.pack.job import pack

LOOKS = [(c, s) for s in ("circle", "square") for c in ("red", "green", "blue", "black")]
CAPTIONS = [f"a {colour} {shape}" for colour, shape in LOOKS * 6]
NETWORKS = [
    "data.image_size=32",
    "autoencoder.block_out_channels=[8,8,16]",
    "autoencoder.layers_per_block=1",
    "autoencoder.norm_groups=4",
    "autoencoder.mid_attention=false",
    "unet.block_out_channels=[16,32]",
    "unet.layers_per_block=1",
    "unet.attention=[false,true]",
    "unet.heads=[1,2]",
    "unet.norm_groups=8",
    "train.precision=fp32",
]
RUN = [
    "data.lanes=2",
    "data.shuffle_block=16",
    "data.source.kind=folder",
    "data.source.shard_samples=10",
    "data.source.val_share=0.2",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "optim.warmup_steps=0",
    "precompute.precision=fp32",
    "precompute.workers=0",
    "sampler.steps=2",
    "eval.features=[]",
    "eval.clip_score=false",
    "eval.num_samples=4",
    "eval.every=0",
    "eval.prompts=[]",
    "logger.wandb.mode=disabled",
]
THREE_CHANNELS = {
    "ffhq_256",
    "imagenet_256",
    "inpainting_256",
    "layout_256",
    "semantic_map_256",
    "super_resolution_256",
}
"""Experiments whose latents have three channels; others have four."""


def draw_pictures(folder: Path, captions: Sequence[str] = CAPTIONS) -> None:
    """Captioned drawings: a coloured circle or square somewhere on white."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number, caption in enumerate(captions):
        colour, shape = LOOKS[number % len(LOOKS)]
        image = Image.new("RGB", (40, 36), "white")
        left, top = draws.integers(2, 14, 2).tolist()
        box = (left, top, left + 18, top + 18)
        pencil = ImageDraw.Draw(image)
        (pencil.ellipse if shape == "circle" else pencil.rectangle)(box, fill=colour)
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)


@dataclass(frozen=True)
class Workshop:
    """Packed pictures, a first stage trained for two steps, and its latents."""

    folder: Path

    def overrides(self, experiment: str, *more: str, run: Path | None = None) -> list[str]:
        """What shrinks an experiment to the workshop's size."""
        latent = 3 if experiment in THREE_CHANNELS else 4
        stage = self.folder / f"first_stage_{latent}.safetensors"
        return [
            f"+experiment={experiment}",
            f"data.dir={self.folder / 'data'}",
            f"data.latents={self.folder / f'latents_{latent}'}",
            f"data.source.path={self.folder / 'pictures'}",
            f"autoencoder.weights={'' if experiment == 'emoji_autoencoder' else stage}",
            f"run.dir={run or self.folder / 'unused'}",
            *NETWORKS,
            *RUN,
            *more,
        ]

    def config(self, experiment: str, *more: str, run: Path | None = None) -> Config:
        """The shrunken experiment."""
        return load_config(self.overrides(experiment, *more, run=run))


def losses(run: Path) -> dict[int, float]:
    """The training loss by step, as the complete lines of metrics.jsonl have it."""
    file = run / "metrics.jsonl"
    complete = file.read_text().split("\n")[:-1] if file.exists() else []
    lines = [json.loads(line) for line in complete]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def packed(folder: Path) -> Workshop:
    """Pictures in a folder, packed; no latents yet."""
    shop = Workshop(folder)
    draw_pictures(shop.folder / "pictures")
    pack(shop.config("emoji"))
    return shop
