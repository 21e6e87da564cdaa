"""A small CLIP of a data set's own, trained by open_clip's trainer on the packed training images.

For data on which no published CLIP was trained, such as 64-pixel drawings. The weights are written
to conditioner.pretrained in half precision, and how well they retrieve unseen images beside them.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from data.image_stream import ImageStream
from models.clip import load_clip
from trainer.config import Config
from trainer.distributed import join
from trainer.images import save_png, to_uint8
from trainer.streams import open_images

EPOCHS = 20
BATCH = 128
LEARNING_RATE = 1e-3


def train_clip(config: Config) -> None:
    """Train conditioner.model on data.train, measure it on data.val, write conditioner.pretrained.

    Raises: FileNotFoundError or ValueError naming the data set that is missing;
    subprocess.CalledProcessError if open_clip's trainer fails.
    """
    ranks = join()
    target = Path(config.conditioner.pretrained)
    train, val = open_images(config, ranks, "train"), open_images(config, ranks, "val")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_csv(train, folder)
        weights = _run_open_clip(config, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in weights.items()}, target)
    figures = retrieval(config, val)
    figures |= {"epochs": EPOCHS, "batch": BATCH, "lr": LEARNING_RATE, "train": train.num_samples}
    target.with_suffix(".figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"wrote {target}: {json.dumps(figures)}")


def _write_csv(images: ImageStream, folder: Path) -> None:
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for index in range(images.num_samples):
            batch = images.read(np.array([index]))
            path = folder / f"{index:06d}.png"
            save_png(path, to_uint8(batch.arrays["images"])[0])
            rows.writerow([path, batch.captions[0]])


def _run_open_clip(config: Config, folder: Path) -> dict[str, Tensor]:
    """Run open_clip_train in a process of its own; it finds our model config by its folder."""
    model = Path(config.conditioner.model)
    start = (
        "import sys, open_clip; from open_clip_train.main import main; "
        "open_clip.add_model_config(sys.argv[1]); main(sys.argv[2:])"
    )
    options = {
        "model": model.stem,
        "dataset-type": "csv",
        "train-data": folder / "train.csv",
        "csv-caption-key": "title",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "fp32",
        "batch-size": BATCH,
        "epochs": EPOCHS,
        "lr": LEARNING_RATE,
        "warmup": 50,
        "wd": 0.1,
        "workers": 0,
        "seed": config.run.seed,
        "logs": folder / "logs",
        "name": "clip",
        "save-frequency": EPOCHS,
        "log-every-n-steps": 10,
        # emoji fill their square: open_clip's default crops would cut most of the picture away
        "aug-cfg": "scale=(0.8,1.0)",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run(
        [sys.executable, "-c", start, str(model.parent), *words],
        check=True,
        env={**os.environ, "WANDB_MODE": "disabled"},
    )
    path = folder / "logs" / "clip" / "checkpoints" / f"epoch_{EPOCHS}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


@torch.inference_mode()
def retrieval(config: Config, images: ImageStream) -> dict[str, float]:
    """How often an image finds its own caption among all: recall at 1 and 5, mean cosines."""
    clip = load_clip(config.conditioner)
    batch = images.read(np.arange(images.num_samples))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.image_mean, clip.image_std))
    pixels = (batch.arrays["images"] / 2 + 0.5 - mean) / std
    pixels = F.interpolate(pixels, clip.image_size, mode="bicubic", antialias=True)
    image = F.normalize(clip.model.encode_image(pixels), dim=-1)
    text = F.normalize(clip.model.encode_text(clip.tokenizer(batch.captions)), dim=-1)
    cosines = image @ text.T
    own = cosines.diagonal()
    better = (cosines > own[:, None]).sum(1)
    others = (cosines.sum() - own.sum()) / (cosines.numel() - len(own))
    return {
        "val_images": len(own),
        "recall_at_1": (better < 1).float().mean().item(),
        "recall_at_5": (better < 5).float().mean().item(),
        "cosine_matched": own.mean().item(),
        "cosine_mismatched": others.item(),
    }
