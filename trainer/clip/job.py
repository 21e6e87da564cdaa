"""Train a small CLIP on the packed training images, by open_clip's trainer.

Use it if published CLIPs were trained on other kinds of images, for instance not on 64-pixel
drawings. The weights go to clip.out in half precision, for conditioner.pretrained. A JSON file
beside them has the recall on validation images.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.child_process import end_with_parent
from data.storage.atomic import write_atomic
from data.streams.images import ImageStream
from models.conditioning.clip import load_clip
from models.config import ConditionerConfig
from trainer.checkpoints.tensors import write_tensors
from trainer.config import Config
from trainer.pictures.png import save_png, to_uint8
from trainer.runtime.ranks import join
from trainer.streams import open_images

EPOCHS = 20
BATCH = 128
LEARNING_RATE = 1e-3
FIGURES = ".figures.json"
"""Suffix of the file beside the weights, with the recall."""


def train_clip(config: Config) -> None:
    """Train conditioner.model on data.train, measure it on data.val, write clip.out.

    Raises: FileExistsError for a file at clip.out; FileNotFoundError or ValueError that names the
    missing data set; subprocess.CalledProcessError if open_clip's trainer fails.
    """
    ranks = join()
    target = Path(config.clip.out)
    for path in (target, target.with_suffix(FIGURES)):
        if os.path.lexists(path):
            raise FileExistsError(f"clip.out: {path} exists: delete it, or choose another file")
    train, val = open_images(config, ranks, "train"), open_images(config, ranks, "val")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_csv(train, folder)
        weights = _run_open_clip(config, folder)
    write_tensors(target, {key: value.half().contiguous() for key, value in weights.items()})
    trained = replace(config.conditioner, pretrained=str(target))
    figures = retrieval(trained, val)
    figures |= {"epochs": EPOCHS, "batch": BATCH, "lr": LEARNING_RATE, "train": train.num_samples}
    text = json.dumps(figures, indent=1) + "\n"
    write_atomic(target.with_suffix(FIGURES), text.encode())
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
    """Run open_clip_train in a subprocess on `folder`/train.csv; return its weights by name."""
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
        # emoji fill their square: open_clip's default crops would remove most of the picture
        "aug-cfg": "scale=(0.8,1.0)",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run(
        [sys.executable, "-c", start, str(model.parent), *words],
        check=True,
        env={**os.environ, "WANDB_MODE": "disabled"},
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    path = folder / "logs" / "clip" / "checkpoints" / f"epoch_{EPOCHS}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


@torch.inference_mode()
def retrieval(config: ConditionerConfig, images: ImageStream) -> dict[str, float]:
    """Measure how well images retrieve their captions among all captions.

    Returns recall at 1 and 5: the share of images whose caption is among the 1 or 5 most similar
    ones, like the zero-shot retrieval of Radford et al. 2021; and the mean cosine similarities of
    matched and of mismatched pairs, in [-1, 1].
    """
    clip = load_clip(config)
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
