"""Normal draws by Box-Muller and by numpy's ziggurat: `python -m tests.benchmarks.random_normals`.

The ziggurat is `np.random.Generator.standard_normal` in float32, with a Philox of its own for each
sample. A ratio is the least processor time of ours over the rounds ÷ the ziggurat's: below 1 ours
is faster. The JSON has the ratio of each case.
"""

import json
import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.turns import least_seconds
from trainer.runtime import rng
from trainer.runtime.rng import Purpose

ROUNDS = 30
SEED = 1
CASES = [
    (64, (4,)),
    (64, (4, 32, 32)),
    (64, (4, 64, 64)),
    (8, (4, 64, 64)),
    (1, (4, 32, 32)),
    (1, (4, 64, 64)),
    (1, (4, 512, 512)),
]
"""Samples, and the shape of a sample's draws."""


def main() -> None:
    """One line a case, then the JSON."""
    ratios = {}
    for batch, shape in CASES:
        epochs, samples = np.zeros(batch, np.int64), np.arange(batch)
        our_call = partial(rng.normal, SEED, Purpose.noise, epochs, samples, shape)
        ziggurat_call = partial(ziggurat, epochs, samples, shape)
        our_s, ziggurat_s = least_seconds(our_call, ziggurat_call, rounds=ROUNDS)
        case = "x".join(map(str, (batch, *shape)))
        ratios[case] = round(our_s / ziggurat_s, 3)
        nanoseconds = 1e9 / (batch * math.prod(shape))
        print(
            f"{case:12} {our_s * nanoseconds:7.2f} ns a value,"
            f" ziggurat {ziggurat_s * nanoseconds:7.2f} ({ratios[case]:.3f}x)",
            flush=True,
        )
    print(json.dumps(ratios))


def ziggurat(epochs: rng.Ids, samples: rng.Ids, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal draws for each sample: [B, *shape]."""
    out = np.empty((len(samples), *shape), np.float32)
    key = [SEED, int(Purpose.noise)]
    for row, epoch, sample in zip(out, epochs.tolist(), samples.tolist(), strict=True):
        philox = np.random.Philox(key=key, counter=[0, 0, epoch, sample])
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return out


if __name__ == "__main__":
    main()
