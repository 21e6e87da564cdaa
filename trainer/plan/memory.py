"""Memory of a training step on one GPU, from DeepSpeed's partitions and buckets and a trace.

The rules are those of DeepSpeed 0.19 with `trainer.engine.zero.deepspeed_config`:

- stage 0: fp32 weights, their gradients and Adam's moments, whole on every rank.
- stages 1 and 2: weights in the forward pass's precision, whole; fp32 master weights and moments
  spread over the ranks. Buckets (`trainer.engine.buckets`) are allocated for every backward pass.
  Stage 1 reduces gradients in the last backward pass, or after it if there is one bucket. Stage 2
  moves each gradient into a bucket at once, and keeps the rank's own share only. With offloading,
  fp32 is in host memory.
- stage 3: weights and gradients are spread, too, and gathered for use: an upper bound.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

from torch import nn

from trainer.engine.buckets import Buckets, gradient_buckets
from trainer.plan.tracing import Stretch, Trace

FP32 = 4
MAX_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of trained parameters."""

    tensors: int
    total: int
    decayed: int
    """Parameters in the optimizer's larger group: matrices and kernels."""

    @classmethod
    def of(cls, module: nn.Module) -> "Sizes":
        """Count the trained parameters of a module."""
        trained = [p for p in module.parameters() if p.requires_grad]
        return cls(
            tensors=len(trained),
            total=sum(p.numel() for p in trained),
            decayed=sum(p.numel() for p in trained if p.dim() >= 2),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Distribution of a run over its ranks."""

    stage: int
    ranks: int
    weight_bytes: int
    """Bytes of a weight in the forward pass: 4 (fp32) or 2 (bf16)."""
    grad_accum_steps: int
    averages: int
    """Number of averages of the weights."""
    frozen_bytes: int
    """Bytes of networks that are not trained: a conditioner that runs in training."""
    offload: bool
    """Whether the optimizer is in host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    weights: int
    frozen: int
    optimizer: int
    """fp32 master weights, if the weights are not fp32, and Adam's two moments."""
    ema: int
    gradients: int
    """Gradients, the bucket for their reduction, and their copies."""
    activations: int
    """Tensors that the backward pass needs, and temporary tensors."""
    host: int
    """Optimizer and averages in host memory, if they are offloaded; not in `peak`."""
    phase: str
    """Phase of the step at its peak."""

    @property
    def peak(self) -> int:
        """Sum of all parts on the GPU."""
        spread = self.weights + self.optimizer + self.ema + self.gradients
        return spread + self.frozen + self.activations


def predict(trace: Trace, sizes: Sizes, layout: Layout) -> Memory:
    """Predict the peak of a step with micro batches like the traced one."""
    share = sizes.total if layout.stage == 0 else -(-sizes.total // layout.ranks)
    width = layout.weight_bytes
    own_masters = layout.stage in (1, 2) or (layout.stage == 3 and width != FP32)
    weights = sizes.total * width
    if layout.stage == 3:
        weights = (share + min(sizes.total, MAX_GATHERED_ELEMENTS)) * width
    usages = {
        0: _whole,
        1: _states_spread,
        2: _gradients_spread,
        3: _all_spread,
    }[layout.stage](trace, sizes, layout, share)
    phase, gradients, activations = max(usages, key=_bytes)
    optimizer, ema = share * FP32 * (2 + own_masters), share * FP32 * layout.averages
    kept = not layout.offload
    return Memory(
        weights=weights,
        frozen=layout.frozen_bytes,
        optimizer=optimizer * kept,
        ema=ema * kept,
        gradients=gradients,
        activations=activations,
        # offloading keeps the gradient in fp32 there, too
        host=0 if kept else optimizer + ema + share * FP32,
        phase=phase,
    )


Usage = tuple[str, int, int]
"""(phase of the step, bytes of gradients, bytes of activations)."""


def _bytes(usage: Usage) -> int:
    return usage[1] + usage[2]


def _whole(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Usage]:
    """Stage 0: autograd's gradients, and buckets with copies of them."""
    gradients = sizes.total * FP32
    # one rank reduces nothing (trainer.engine.zero)
    bucket = _buckets(sizes, layout).elements * FP32 if layout.ranks > 1 else 0
    return [
        *_backward(trace, sizes, layout, bucket=0),
        ("reduction of gradients", gradients + bucket, 0),
    ]


def _states_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Usage]:
    """Stage 1: all gradients, and a bucket for their reduction after the backward pass.

    Two buckets are filled and sent in the last backward pass.
    """
    width, buckets = layout.weight_bytes, _buckets(sizes, layout)
    gradients, bucket = sizes.total * width, buckets.total * width
    own = share * width if sizes.total > buckets.elements else 0
    if buckets.overlaps:
        return _sent_early(trace, sizes, layout, share)
    return [
        *_backward(trace, sizes, layout, bucket=bucket),
        # the bucket is copied once more to be sent
        ("reduction of gradients", gradients + bucket + own, 0),
        _step(sizes, layout, gradients=share * width),
    ]


def _sent_early(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Usage]:
    """Stage 1 with two buckets: gradients leave for the buckets in the last backward pass.

    A bucket that is sent is copied once more. The rank's own share stays.
    """
    width, buckets = layout.weight_bytes, _buckets(sizes, layout)
    accumulates = layout.grad_accum_steps > 1
    before = sizes.total if accumulates else 0
    usages = [("backward pass", (before + buckets.total) * width, trace.peak_bytes)]
    filled = moved = 0
    for stretch in trace.stretches:
        if filled + stretch.elements > buckets.elements:
            kept = min(share, moved) + max(before - moved, 0)
            held = (kept + buckets.total + filled) * width
            usages.append(("reduction of gradients", held, stretch.left_bytes))
            filled = 0
        filled += stretch.elements
        moved += stretch.elements
    usages.append(("reduction of gradients", (share + buckets.total + filled) * width, 0))
    usages.append(_step(sizes, layout, gradients=share * width))
    return usages


def _gradients_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Usage]:
    """Stage 2: each gradient moves into the bucket at once; a full bucket is sent."""
    width, buckets = layout.weight_bytes, _buckets(sizes, layout)
    accumulated = share * width if layout.grad_accum_steps > 1 else 0
    kept = share * width if sizes.total > buckets.elements else 0
    held = buckets.total * width + accumulated + kept
    usages = [("backward pass", held, trace.peak_bytes)]
    filled = 0
    for stretch in trace.stretches:
        if filled + stretch.elements > buckets.elements:
            usages.append(("reduction of gradients", held + filled * width, stretch.left_bytes))
            filled = 0
        filled += stretch.elements
    usages.append(("reduction of gradients", held + filled * width, 0))
    usages.append(_step(sizes, layout, gradients=share * width))
    return usages


def _all_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Usage]:
    """Stage 3: at all times a buffer for the rank's share of gradients, and the bucket."""
    held = (share + _buckets(sizes, layout).total) * layout.weight_bytes
    return [("backward pass", held, trace.peak_bytes), _step(sizes, layout, gradients=held)]


def _buckets(sizes: Sizes, layout: Layout) -> Buckets:
    return gradient_buckets(
        sizes.total, stage=layout.stage, ranks=layout.ranks, offload=layout.offload
    )


def _backward(trace: Trace, sizes: Sizes, layout: Layout, *, bucket: int) -> Iterator[Usage]:
    """Yield the usage after each gradient of a backward pass: activations become gradients.

    With gradient accumulation, the gradients of the first micro batch stay until the end.
    """
    accumulates = layout.grad_accum_steps > 1
    made = sizes.total if accumulates else 0
    for stretch in trace.stretches:
        yield ("backward pass", made * layout.weight_bytes + bucket, stretch.peak_bytes)
        made += 0 if accumulates else stretch.elements


def _step(sizes: Sizes, layout: Layout, *, gradients: int) -> Usage:
    """Return the usage of AdamW: fp32 gradients of the larger group of parameters."""
    group = 0 if layout.offload else -(-sizes.decayed // layout.ranks) * FP32
    return ("optimizer step", gradients + group, 0)


def at_micro_batch(first: Trace, second: Trace, micro_batch: int) -> Trace:
    """Extrapolate two traces to another micro batch: every count is linear in the samples."""
    span = second.micro_batch - first.micro_batch
    more = micro_batch - first.micro_batch

    def line(low: int, high: int) -> int:
        return low + (high - low) * more // span

    return Trace(
        micro_batch=micro_batch,
        flops=line(first.flops, second.flops),
        operators=line(first.operators, second.operators),
        stretches=tuple(
            Stretch(
                line(low.peak_bytes, high.peak_bytes),
                line(low.left_bytes, high.left_bytes),
                low.elements,
            )
            for low, high in zip(first.stretches, second.stretches, strict=True)
        ),
    )


def largest_micro_batch(
    first: Trace, second: Trace, sizes: Sizes, layout: Layout, limit_bytes: float, *, samples: int
) -> int:
    """Return the largest micro batch that divides a rank's samples and fits; 0 if none fits.

    layout: its number of micro batches does not count. samples: of a rank in an optimizer step.
    """
    for micro_batch in reversed(divisors(samples)):
        one = replace(layout, grad_accum_steps=samples // micro_batch)
        if predict(at_micro_batch(first, second, micro_batch), sizes, one).peak <= limit_bytes:
            return micro_batch
    return 0


def divisors(number: int) -> list[int]:
    """Return all divisors, in order."""
    low = [one for one in range(1, isqrt(number) + 1) if number % one == 0]
    return sorted({*low, *(number // one for one in low)})
