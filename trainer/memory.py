"""What a training step holds on one GPU: DeepSpeed's flat partitions and buckets, and the trace.

The bookkeeping is that of DeepSpeed 0.19 with the options of `trainer.engine.deepspeed_config`:

- stage 0: fp32 weights, their gradients and Adam's moments, whole on every rank.
- stages 1 and 2: weights in the forward pass's precision, whole; fp32 master weights and moments
  spread over the ranks. A bucket (`trainer.buckets`) is allocated for every backward pass. Stage 1
  reduces gradients after the last backward pass; stage 2 moves each one into the bucket as it is
  made, and keeps its own share only. Offloaded, all of fp32 is in host memory.
- stage 3: weights and gradients are spread, too, and gathered as they are used: an upper bound.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trainer.buckets import bucket_elements
from trainer.tracing import Stretch, Trace

FP32 = 4
MAX_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of trained parameters."""

    total: int
    decayed: int
    """Of the optimizer's larger group: matrices and kernels."""

    @classmethod
    def of(cls, module: nn.Module) -> "Sizes":
        """Count a module's."""
        trained = [p for p in module.parameters() if p.requires_grad]
        return cls(
            total=sum(p.numel() for p in trained),
            decayed=sum(p.numel() for p in trained if p.dim() >= 2),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is spread."""

    stage: int
    ranks: int
    weight_bytes: int
    """Of one weight in the forward pass: 4 (fp32) or 2 (bf16)."""
    grad_accum_steps: int
    averages: int
    """Moving averages of the weights."""
    frozen_bytes: int
    """Networks that are not trained: the first stage and the text encoder."""
    offload: bool
    """Whether the optimizer is in host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step, by part."""

    weights: int
    frozen: int
    optimizer: int
    """fp32 master weights, where the weights themselves are not, and Adam's two moments."""
    ema: int
    gradients: int
    """Gradients, the bucket they are reduced in, and their copies."""
    activations: int
    """What the backward pass needs, with its transients."""
    host: int
    """Of the optimizer and its averages in host memory, where they are offloaded; not in `peak`."""
    moment: str
    """When that is."""

    @property
    def peak(self) -> int:
        """All parts together."""
        spread = self.weights + self.optimizer + self.ema + self.gradients
        return spread + self.frozen + self.activations


def predict(trace: Trace, sizes: Sizes, layout: Layout) -> Memory:
    """The fullest moment of a step whose micro batches are as traced."""
    share = sizes.total if layout.stage == 0 else -(-sizes.total // layout.ranks)
    width = layout.weight_bytes
    own_masters = layout.stage in (1, 2) or (layout.stage == 3 and width != FP32)
    weights = sizes.total * width
    if layout.stage == 3:
        weights = (share + min(sizes.total, MAX_GATHERED_ELEMENTS)) * width
    moments = {
        0: _whole,
        1: _states_spread,
        2: _gradients_spread,
        3: _all_spread,
    }[layout.stage](trace, sizes, layout, share)
    name, gradients, activations = max(moments, key=lambda one: sum(one[1:]))
    optimizer, ema = share * FP32 * (2 + own_masters), share * FP32 * layout.averages
    kept = not layout.offload
    return Memory(
        weights=weights,
        frozen=layout.frozen_bytes,
        optimizer=optimizer * kept,
        ema=ema * kept,
        gradients=gradients,
        activations=activations,
        # and the gradient in fp32
        host=0 if kept else optimizer + ema + share * FP32,
        moment=name,
    )


Moment = tuple[str, int, int]
"""(name, gradients, activations), in bytes."""


def _whole(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Moment]:
    """Stage 0: gradients stay where autograd puts them; buckets are copies of them."""
    gradients = sizes.total * FP32
    # one rank has nothing to reduce: see Engine
    bucket = bucket_elements(sizes.total) * FP32 if layout.ranks > 1 else 0
    return [
        *_backward(trace, sizes, layout, bucket=0),
        ("reduction of gradients", gradients + bucket, 0),
    ]


def _states_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Moment]:
    """Stage 1: all gradients, and the bucket that they move through after the backward pass."""
    width = layout.weight_bytes
    gradients, bucket = sizes.total * width, bucket_elements(sizes.total) * width
    own = share * width if sizes.total > bucket_elements(sizes.total) else 0
    return [
        *_backward(trace, sizes, layout, bucket=bucket),
        # what has moved into the bucket is copied once more to be sent
        ("reduction of gradients", gradients + bucket + own, 0),
        _step(sizes, layout, gradients=share * width),
    ]


def _gradients_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Moment]:
    """Stage 2: gradients move into the bucket as they are made; a full one is sent at once."""
    width = layout.weight_bytes
    accumulated = share * width if layout.grad_accum_steps > 1 else 0
    kept = share * width if sizes.total > bucket_elements(sizes.total) else 0
    held = bucket_elements(sizes.total) * width + accumulated + kept
    moments = [("backward pass", held, trace.peak_bytes)]
    filled = 0
    for stretch in trace.stretches:
        if filled + stretch.elements > bucket_elements(sizes.total):
            moments.append(("reduction of gradients", held + filled * width, stretch.left_bytes))
            filled = 0
        filled += stretch.elements
    moments.append(("reduction of gradients", held + filled * width, 0))
    moments.append(_step(sizes, layout, gradients=share * width))
    return moments


def _all_spread(trace: Trace, sizes: Sizes, layout: Layout, share: int) -> list[Moment]:
    """Stage 3: a gradient buffer of the rank's share, and the bucket, at all times."""
    held = (share + bucket_elements(sizes.total)) * layout.weight_bytes
    return [("backward pass", held, trace.peak_bytes), _step(sizes, layout, gradients=held)]


def _backward(trace: Trace, sizes: Sizes, layout: Layout, *, bucket: int) -> Iterator[Moment]:
    """Gradients come as activations go, unless those of an earlier micro batch are there."""
    accumulates = layout.grad_accum_steps > 1
    made = sizes.total if accumulates else 0
    for stretch in trace.stretches:
        yield ("backward pass", made * layout.weight_bytes + bucket, stretch.peak_bytes)
        made += 0 if accumulates else stretch.elements


def _step(sizes: Sizes, layout: Layout, *, gradients: int) -> Moment:
    """The gradient of the larger group of parameters in fp32; fused, AdamW needs no more."""
    group = 0 if layout.offload else -(-sizes.decayed // layout.ranks) * FP32
    return ("optimizer step", gradients + group, 0)


def at_micro_batch(first: Trace, second: Trace, micro_batch: int) -> Trace:
    """The trace of another micro batch: every count is a constant and a part for each sample."""
    span = second.micro_batch - first.micro_batch
    more = micro_batch - first.micro_batch

    def line(low: int, high: int) -> int:
        return low + (high - low) * more // span

    return Trace(
        micro_batch=micro_batch,
        flops=line(first.flops, second.flops),
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
    first: Trace, second: Trace, sizes: Sizes, layout: Layout, limit_bytes: float
) -> int:
    """The largest that stays below the limit; 0 if none does."""

    def fits(micro_batch: int) -> bool:
        memory = predict(at_micro_batch(first, second, micro_batch), sizes, layout)
        return memory.peak <= limit_bytes

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
