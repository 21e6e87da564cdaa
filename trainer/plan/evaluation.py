"""Memory and time of an evaluation on a GPU: drawing with an average of the weights, decoding.

The training's state stays on the GPU meanwhile. The feature networks are not counted: their weights
are known when they are loaded.
"""

from dataclasses import dataclass

import torch

from models.config.conditioning import CONDITIONERS
from models.first_stage.autoencoder import build_stage
from models.first_stage.first_stage import FirstStage
from models.first_stage.memory import activation_bytes
from trainer.config import Config, Task
from trainer.engine.averages import averages
from trainer.plan.machine import Machine
from trainer.plan.memory import FP32, Memory, Sizes
from trainer.plan.tracing import LiveBytes, fake_mode, fake_module
from trainer.runtime.devices import inference_dtype
from trainer.runtime.slices import MOST_BYTES
from trainer.train.task import StepPlan

TRACED_IMAGES = 2


@dataclass(frozen=True, slots=True)
class TracedEvaluation:
    """The networks of an evaluation, traced without a backward pass."""

    forward_bytes: float
    """Peak of the denoiser's activations for an image, at a scale of guidance of 1."""
    forward_flops: float
    """FLOPs of the denoiser for an image."""
    decoding_flops: float
    """FLOPs of the first stage for an image."""
    frozen_bytes: int
    """Bytes of the weights of the first stage and of a frozen conditioner."""


@dataclass(frozen=True, slots=True)
class EvaluationCost:
    """Memory and time of an evaluation."""

    peak_bytes: int
    """Peak on a GPU, with the state of the training."""
    phase: str
    """Phase of the evaluation at its peak."""
    seconds: float
    """Time of drawing and decoding for all averages."""


def trace_evaluation(config: Config, step: StepPlan) -> TracedEvaluation | None:
    """Trace a denoiser and its first stage on fake tensors.

    Returns None for another task, or without evaluations.
    """
    if not config.eval.every or config.task is not Task.diffusion:
        return None
    dtype = _dtype(config)
    mode = fake_mode()
    module = fake_module(step.build_module, dtype, mode).eval()
    with mode, torch.no_grad(), LiveBytes(module) as drawing:
        step.loss(module, TRACED_IMAGES)
    stage, mode = config.autoencoder, fake_mode()
    first_stage = fake_module(lambda: build_stage(stage), dtype, mode).eval()
    side = config.data.image_size // stage.downsample_factor
    with mode, torch.no_grad(), LiveBytes(first_stage) as decoding:
        assert isinstance(first_stage, FirstStage)
        first_stage.decode(torch.empty(1, stage.latent_channels, side, side, dtype=dtype))
    parameters = sum(parameter.numel() for parameter in first_stage.parameters())
    text = step.frozen.bytes
    if config.data.store_text:  # in training it is in host memory
        text = (step.frozen.parameters - parameters) * FP32
    return TracedEvaluation(
        forward_bytes=drawing.stretch(0).peak_bytes / TRACED_IMAGES,
        forward_flops=drawing.flops / TRACED_IMAGES,
        decoding_flops=decoding.flops,
        frozen_bytes=parameters * dtype.itemsize + text,
    )


def evaluation_cost(
    config: Config, machine: Machine, traced: TracedEvaluation, sizes: Sizes, memory: Memory
) -> EvaluationCost:
    """Predict an evaluation of each average. memory: of the training, whose state stays."""
    own, stage = config.eval, config.autoencoder
    width = _dtype(config).itemsize
    predictions = 2 if _is_guided(config) else 1
    whole = own.batch_size * activation_bytes(stage, config.data.image_size**2, width)
    phases = {
        "drawing": own.batch_size * predictions * traced.forward_bytes,
        "decoding": min(whole, max(MOST_BYTES, whole / own.batch_size)),
    }
    phase = max(phases, key=lambda name: phases[name])
    # the average is gathered in fp32, and cast
    average = sizes.total * (FP32 + (width if width < FP32 else 0))
    kept = memory.weights + memory.optimizer + memory.ema
    each = config.sampler.steps * predictions * traced.forward_flops + traced.decoding_flops
    images = own.num_samples / machine.ranks
    return EvaluationCost(
        peak_bytes=int(kept + average + traced.frozen_bytes + phases[phase]),
        phase=phase,
        seconds=machine.products_s(len(averages(config.ema)) * images * each),
    )


def _dtype(config: Config) -> torch.dtype:
    return inference_dtype(torch.device("cuda"), config.train.precision)


def _is_guided(config: Config) -> bool:
    """Whether each step predicts with the condition and without."""
    entry = CONDITIONERS[config.conditioner.kind]
    has_condition = (
        entry.has_tokens or entry.planes(config.conditioner, config.autoencoder.latent_channels) > 0
    )
    return has_condition and config.sampler.guidance_scale != 1.0
