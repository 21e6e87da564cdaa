"""Small latent jobs: image shards of our own writer, a first stage of random weights."""

import hashlib
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data.shards.codecs import encode_png
from data.shards.manifest import Kind, Manifest
from data.shards.writer import ShardSetWriter
from models.first_stage.autoencoder import AutoencoderKL
from trainer.cli import load_config
from trainer.config import Config
from trainer.precompute.job import precompute

TINY = [
    "data.image_size=16",
    "autoencoder.block_out_channels=[8,8,16]",
    "autoencoder.layers_per_block=1",
    "autoencoder.norm_groups=4",
    "autoencoder.mid_attention=false",
    "precompute.batch_size=4",
    "precompute.workers=0",
]
UNMEASURED = [
    "eval.every=0",
    "eval.features=[]",
    "eval.clip_score=false",
    "logger.wandb.mode=disabled",
]
"""A training without evaluations."""


def write_pictures(folder: Path, samples: int, shard_samples: int, size: int) -> Manifest:
    """Shards of smooth random pictures, a little larger than `size`; sample i is of seed i."""
    with ShardSetWriter(folder, Kind.images, shard_samples) as writer:
        for number in range(samples):
            draws = np.random.default_rng(number)
            coarse = Image.fromarray(draws.integers(0, 256, (5, 6, 3), np.uint8))
            picture = coarse.resize((size + 8, size + 4), Image.Resampling.BICUBIC)
            members = {"png": encode_png(picture), "txt": f"picture {number}".encode()}
            writer.write(members | {"json": b'{"seed": %d}' % number})
    manifest = Manifest(kind=Kind.images, shards=writer.shards, licence="CC0")
    manifest.save(folder)
    return manifest


def write_first_stage(path: Path, config: Config, seed: int = 0) -> None:
    """Random weights of the config's first stage."""
    torch.manual_seed(seed)
    save_file(AutoencoderKL(config.autoencoder).state_dict(), path)


def job_config(folder: Path, *overrides: str) -> Config:
    """The job on `folder`/train with `folder`/first_stage.safetensors, into `folder`/latents."""
    options = [
        "+experiment=emoji",
        f"data.dir={folder}",
        f"autoencoder.weights={folder / 'first_stage.safetensors'}",
        *TINY,
        *overrides,
    ]
    return load_config(options)


def make_job(folder: Path, samples: int = 26, shard_samples: int = 6) -> Config:
    """A small job, ready to run."""
    config = job_config(folder)
    write_pictures(Path(config.data.train), samples, shard_samples, config.data.image_size)
    write_first_stage(Path(config.autoencoder.weights), config)
    return config


def ready(overrides: list[str], samples: int, shard_samples: int) -> Config:
    """The config of these overrides, its pictures, first stage and latents made."""
    config = load_config(overrides)
    write_first_stage(Path(config.autoencoder.weights), config)
    write_pictures(Path(config.data.train), samples, shard_samples, config.data.image_size)
    precompute(config)
    return config


def folder_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, hidden ones too."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def run_task(config: Config, log: Path) -> None:
    """One task of a job, in a process of its own."""
    torch.set_num_threads(1)
    with log.open("a") as file, redirect_stdout(file):
        precompute(config)
