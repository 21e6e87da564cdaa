"""Encoding and decoding by our first stage and by diffusers', with the same random weights.

KL-f8 at a quarter of its width, and the emoji first stage. Both take turns on one thread, on
contiguous input, as a pipeline gives it. A row compares the fastest of the rounds, which other
programs on the machine disturb least; the last line compares the sums of the rows.
"""

import json
from functools import partial
from typing import Any

import torch

from models.config import AutoencoderConfig
from models.first_stage.autoencoder import AutoencoderKL
from tests.benchmarks.turns import least_seconds
from tests.support.oracles import diffusers_autoencoder, load_both_ways

ROUNDS = 12
EMOJI = {
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_groups": 8,
    "mid_attention": False,
}
QUARTER_KL_F8 = {"block_out_channels": [32, 64, 128, 128], "norm_groups": 8}
ROWS: list[tuple[str, dict[str, Any], int, int]] = [
    ("KL-f8 x 0.25", QUARTER_KL_F8, 2, 128),
    ("KL-f8 x 0.25", QUARTER_KL_F8, 1, 256),
    ("emoji f4", EMOJI, 16, 64),
    ("emoji f4", EMOJI, 4, 128),
]
"""Name, options, images at once, their side in pixels."""


@torch.inference_mode()
def main() -> None:
    """One line a row, then the JSON."""
    torch.set_num_threads(1)
    totals = {"encode": [0.0, 0.0], "decode": [0.0, 0.0]}
    for name, options, batch, side in ROWS:
        config = AutoencoderConfig(**options)
        ours, theirs = AutoencoderKL(config).eval(), diffusers_autoencoder(config).eval()
        load_both_ways(ours, theirs)
        images = torch.rand(batch, 3, side, side) * 2 - 1
        latents = torch.randn(
            batch, config.latent_channels, *[side // config.downsample_factor] * 2
        )
        seconds = {
            direction: least_seconds(
                partial(getattr(ours, direction), given),
                partial(getattr(theirs, direction), given),
                rounds=ROUNDS,
            )
            for direction, given in (("encode", images), ("decode", latents))
        }
        columns = [f"{name}, {batch} x {side} px"]
        for direction, (our_s, their_s) in seconds.items():
            totals[direction][0] += our_s
            totals[direction][1] += their_s
            ratio = f"{their_s / our_s:.2f}x"
            columns.append(f"{direction} {our_s * 1e3:.0f}/{their_s * 1e3:.0f} ms ({ratio})")
        print("  ".join(columns), flush=True)
    figures = {
        f"ratio_diffusers_{direction}": round(their_s / our_s, 3)
        for direction, (our_s, their_s) in totals.items()
    }
    print(json.dumps(figures | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
