"""How busy a latent job keeps its encoder, and what all the rest costs.

The first stage of latent diffusion at web scale (KL-f8, random weights) on small pictures, which
cost it least, in shards that batches do not divide. All processes share the cores of this one.
Overrides on the command line change the job.

encoder_share: of the wall time, as the job prints it. encoder_cpu_share: of the job's processor
time, from that of the encoder alone; other programs on the machine do not change it.
"""

import contextlib
import io
import json
import re
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.support.latent_jobs import write_first_stage, write_pictures
from trainer.cli import load_config
from trainer.config import Config
from trainer.precompute.encode import Encoder
from trainer.precompute.job import precompute

SAMPLES = 360
SHARD_SAMPLES = 90
OPTIONS = [
    "+experiment=laion_256",
    "data.image_size=64",
    "precompute.precision=fp32",
    "precompute.batch_size=16",
    "precompute.workers=1",
]
SUMMARY = re.compile(r"([\d.]+) images/s, encoder ([\d.]+)% of the time")


def main() -> None:
    """Run the encoder alone, the job, and the encoder again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [f"data.dir={folder}", f"autoencoder.weights={folder / 'weights.safetensors'}"]
        config = load_config([*OPTIONS, *files, *sys.argv[1:]])
        write_first_stage(Path(config.autoencoder.weights), config)
        write_pictures(Path(config.data.train), SAMPLES, SHARD_SAMPLES, config.data.image_size)
        alone_s = [_encoder_alone(config)]
        output = io.StringIO()
        start_s = _cpu_s()
        with contextlib.redirect_stdout(output):
            precompute(config)
        job_s = _cpu_s() - start_s
        alone_s.append(_encoder_alone(config))
    sys.stdout.write(output.getvalue())
    found = SUMMARY.search(output.getvalue())
    assert found is not None
    figures = {
        "images_per_s": float(found[1]),
        "encoder_share": float(found[2]) / 100,
        "encoder_cpu_share": round(SAMPLES * sum(alone_s) / 2 / job_s, 3),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


def _encoder_alone(config: Config, batches: int = 4) -> float:
    """Processor seconds of the networks for an image, on pixels that lie ready."""
    encoder = Encoder(config)
    side, size = config.data.image_size, config.precompute.batch_size
    draws = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    pixels = torch.from_numpy(draws)
    encoder(pixels, [""] * size).wait()
    start_s = _cpu_s()
    for _ in range(batches):
        encoder(pixels, [""] * size).wait()
    return (_cpu_s() - start_s) / (batches * size)


def _cpu_s() -> float:
    """Processor time of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
