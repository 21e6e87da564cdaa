"""Work and memory of `trainer.precompute`: the encoder of the first stage, without weights."""

from dataclasses import dataclass

import torch

from models.first_stage.autoencoder import build_autoencoder
from trainer.config import Config, Precision
from trainer.plan.tracing import LiveBytes, fake_mode, fake_module


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of one batch of images to moments."""

    flops_per_image: float
    """FLOPs of the first stage's encoder."""
    peak_bytes: int
    """Peak of live activations."""
    weight_bytes: int


def trace_encoding(config: Config) -> Encoding:
    """Trace the encoding of precompute.batch_size images of data.image_size, on fake tensors."""
    options, size, side = config.autoencoder, config.precompute.batch_size, config.data.image_size
    bf16 = config.precompute.precision is Precision.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    mode = fake_mode()
    module = fake_module(lambda: build_autoencoder(options).encoder, dtype, mode)
    with mode, torch.no_grad():
        images = torch.empty(size, options.in_channels, side, side, dtype=dtype)
        with LiveBytes(module) as alive:
            module(images)
    weights = sum(one.numel() for one in module.parameters()) * dtype.itemsize
    return Encoding(alive.flops / size, alive.stretch(0).peak_bytes, weights)
