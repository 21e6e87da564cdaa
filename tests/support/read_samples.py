"""A rank of the test: writes which samples it is given, step by step, without training on them."""

import json
import sys
from itertools import islice
from pathlib import Path

from trainer.cli import load_config
from trainer.runtime.ranks import join
from trainer.streams import open_latents

if __name__ == "__main__":
    folder, first, last, *overrides = sys.argv[1:]
    ranks = join()
    stream = open_latents(load_config(overrides), ranks)
    steps = islice(stream.steps(int(first)), int(last) - int(first))
    samples = [
        [
            [epoch, index, key]
            for batch in batches
            for epoch, index, key in zip(
                batch.epoch.tolist(), batch.index.tolist(), batch.keys, strict=True
            )
        ]
        for batches in steps
    ]
    (Path(folder) / f"{ranks.world_size}_{ranks.rank}.json").write_text(json.dumps(samples))
