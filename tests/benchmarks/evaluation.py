"""FID of two folders of PNGs, by us and by torch-fidelity's command, with the same Inception.

From the files to the number: decoding, features, statistics and the distance. Weights are random,
which costs the same. Both are processes of their own, on all cores, started in turns. A row
compares the fastest of the rounds, which other programs on the machine disturb least.

ratio_torch_fidelity: their time by ours, of whole processes; _cpu: of their processor time, which
other programs change less. ratio_decode_and_extract: of what more images cost, as in a folder so
large that starting and the distance of two 2048 x 2048 covariances do not count.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.support.inception import inception_weights
from trainer.metrics.feature_set import FeatureCollector, FeatureSet, batches
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.image_folder import ImageFolder
from trainer.metrics.inception import InceptionV3
from trainer.runtime.ranks import Ranks

IMAGES, FEW = 128, 2
SIDE = 256
BATCH = 32
ROUNDS = 2


def main() -> None:
    """One line a round, then the JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = inception_weights(folder / "weights.pth", seed=0)
        for number, kind in enumerate(("samples", "reference")):
            write_images(folder / kind, IMAGES, number)
            write_images(folder / f"few_{kind}", FEW, number)
        best: dict[str, list[float]] = {}
        distances: dict[str, float] = {}
        for round_number in range(ROUNDS):
            for who in ("ours", "theirs"):
                for few in ("few_", ""):
                    pair = [str(folder / f"{few}{kind}") for kind in ("samples", "reference")]
                    spent_s, distances[who] = timed(who, str(weights), *pair)
                    known = best.setdefault(few + who, spent_s)
                    best[few + who] = [min(two) for two in zip(known, spent_s, strict=True)]
            print(f"round {round_number + 1} of {ROUNDS}: {best}", file=sys.stderr, flush=True)
    assert abs(distances["ours"] / distances["theirs"] - 1) < 1e-3, distances
    more = {who: best[who][0] - best[f"few_{who}"][0] for who in ("ours", "theirs")}
    extracted = 2 * (IMAGES - FEW)
    figures = {
        "ratio_torch_fidelity": round(best["theirs"][0] / best["ours"][0], 3),
        "ratio_torch_fidelity_cpu": round(best["theirs"][1] / best["ours"][1], 3),
        "ratio_decode_and_extract": round(more["theirs"] / more["ours"], 3),
        "images_per_s": round(extracted / more["ours"], 2),
        "torch_fidelity_images_per_s": round(extracted / more["theirs"], 2),
        "images": 2 * IMAGES,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


def write_images(folder: Path, count: int, seed: int) -> None:
    """Pictures that compress about as photographs do."""
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for number in range(count):
        coarse = draws.integers(0, 256, (16, 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        grain = draws.normal(0, 4, (SIDE, SIDE, 3))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")


def timed(who: str, weights: str, *pair: str) -> tuple[list[float], float]:
    """[wall, processor] seconds of a process, and the distance that it printed."""
    if who == "ours":
        command = [sys.executable, "-m", "tests.benchmarks.evaluation", weights, *pair]
    else:
        command = [str(Path(sys.executable).with_name("fidelity")), "--fid", "--json", "--silent"]
        command += ["--input1", pair[0], "--input2", pair[1], "--batch-size", str(BATCH), "--cpu"]
        command += ["--feature-extractor", "inception-v3-compat", "--no-cache"]
        command += ["--feature-extractor-weights-path", weights]
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    clock_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    (distance,) = json.loads(done.stdout).values()
    return [clock_s, cpu_s], distance


def ours(weights: str, *pair: str) -> None:
    """Our side, as `trainer.evaluate` with eval.images does it, of both folders."""
    extractor, alone = InceptionV3(weights), Ranks(0, 1, torch.device("cpu"))

    @torch.inference_mode()
    def measured(folder: str) -> FeatureSet:
        images = ImageFolder(folder, SIDE, "eval.images")
        collector = FeatureCollector(extractor, alone, keeps_rows=False)
        for batch in images.read(batches(len(images), BATCH, alone)):
            collector.update(batch)
        return collector.finish()

    samples, reference = (measured(folder).moments for folder in pair)
    print(json.dumps({"frechet_inception_distance": frechet_distance(samples, reference)}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ours(*sys.argv[1:])
    else:
        main()
