"""What a folder of latents holds, and what its encoder makes of the images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.shards.transforms import square
from models.first_stage.autoencoder import load_autoencoder
from trainer.config import Config

SAMPLES = 26


def stored(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every member of every latent shard, by key and extension, as tarfile reads them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("latents/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in samples.setdefault(key, {})
                samples[key][extension] = file.read()
    return samples


def moments(folder: Path, extension: str = "moments.npy") -> np.ndarray:
    arrays = [np.load(io.BytesIO(sample[extension])) for sample in stored(folder).values()]
    return np.stack(arrays)


def inputs(folder: Path) -> torch.Tensor:
    """The pictures as the first stage sees them: [B, 3, 16, 16] in [-1, 1]."""
    pixels = []
    for path in sorted(folder.glob("train/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".png") and file is not None:
                    pixels.append(square(Image.open(file), 16))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double().div(127.5).sub(1)


def direct(config: Config, images: torch.Tensor) -> np.ndarray:
    """Moments in double precision, one image at a time."""
    network = load_autoencoder(config.autoencoder).double()
    with torch.inference_mode():
        return torch.cat([network.encode(image[None]) for image in images]).numpy()
