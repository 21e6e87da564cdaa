"""Time of a training step on a machine: products, launches, memory, network, storage.

Every time is a number of bytes, operations or operators divided by a rate of the machine;
docs/planning.md has the sources of the rates. Collectives use rings (Patarasuk and Yuan 2009): an
all-reduce moves 2 (W-1)/W of its data through every link, an all-gather or a reduce-scatter half of
that.
"""

from dataclasses import dataclass

from trainer.config import Config
from trainer.plan.machine import GB, Machine
from trainer.runtime.devices import launch_s

GIB = 2**30
FP32 = 4
HOST_BYTES_PER_S = 200 * GB
"""Rate of a node's memory: eight channels of DDR4-3200."""
BACKWARD = 2 / 3
"""Share of the backward pass in a micro batch: twice the products of the forward pass."""
DEEPSPEED_OPERATORS = 15
"""Operators of DeepSpeed's optimizer step for each tensor of weights at stages 1 to 3: tests for
infinities, norm, copies between tensors, bucket and flat partition, scale, update."""
ADAM_BYTES = 28
"""Bytes of fused AdamW for a parameter: it reads weight, gradient and two moments in fp32, and
writes all but the gradient."""
GATHER_OPERATORS = 3
"""Operators of stage 3 for each tensor in a micro batch: gathers for the forward and the backward
pass, and a scatter of the gradient."""
AVERAGE_BYTES = 12
"""Bytes of an average for a parameter: it reads weight and average in fp32, writes the average."""
FLAT_BYTES = 50
"""Other bytes for a parameter of a step with 16-bit gradients and fp32 master weights, as DeepSpeed
does it: two tests for infinities 4, norm in fp64 18, copies to the bucket and to the flat partition
8, to fp32 6, scale 8, weights back to 16 bits 6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one rank in an optimizer step."""

    stage: int
    """Stage of ZeRO."""
    flops: float
    """FLOPs of all micro batches."""
    operators: int
    """Operators of one micro batch, forward and backward."""
    optimizer_operators: int
    """Operators of the optimizer's step, which no compiler fuses."""
    parameters: int
    weight_bytes: int
    grad_accum_steps: int
    averages: int
    read_bytes: int
    """Bytes of the samples of all ranks."""
    unfused_bytes: int = 0
    """Bytes that the optimizer moves for a parameter beside those of fused operators."""
    overlaps: bool
    """Whether collectives run beside the products of forward and backward passes."""
    offload: bool = False
    """Whether the optimizer is in host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step by cause."""

    compute_s: float
    launch_s: float
    """Time of operators beside their products."""
    optimizer_s: float
    communication_s: float
    hidden_s: float
    """Part of the communication that runs beside the products."""
    store_s: float
    """Time of reading the samples of the step, in parallel to everything else."""

    @property
    def total_s(self) -> float:
        """Seconds of the step: the sum of its parts, or the storage if that is slower."""
        shown = self.communication_s - self.hidden_s
        return max(self.compute_s + self.launch_s + shown + self.optimizer_s, self.store_s)

    @property
    def limit(self) -> str:
        """The part of the step that takes longest."""
        if self.store_s >= self.total_s:
            return "store"
        parts = {
            "compute": self.compute_s,
            "launches": self.launch_s,
            "optimizer": self.optimizer_s,
            "communication": self.communication_s - self.hidden_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(machine: Machine, work: Work, *, store_gib_per_s: float) -> StepTime:
    """Predict the time of an optimizer step; store_gib_per_s: rate of the store for all ranks."""
    compute_s = machine.products_s(work.flops)
    launches_s = work.grad_accum_steps * work.operators * machine.launch_s
    sent = ring_bytes(work.stage, work)
    return StepTime(
        compute_s=compute_s,
        launch_s=launches_s,
        optimizer_s=optimizer_s(machine, work),
        communication_s=machine.ring_s(sent),
        hidden_s=hidden_s(machine, work, compute_s + launches_s),
        store_s=work.read_bytes / (store_gib_per_s * GIB),
    )


def optimizer_s(machine: Machine, work: Work) -> float:
    """Return the seconds of the optimizer's step and of the averages."""
    share = work.parameters / (1 if work.stage == 0 else machine.ranks)
    flat = FLAT_BYTES if work.stage or work.weight_bytes < FP32 else 0
    each = ADAM_BYTES + flat + AVERAGE_BYTES * work.averages + work.unfused_bytes
    touched = share * each
    launches_s = work.optimizer_operators * launch_s("loop")
    if not work.offload:
        return launches_s + touched / (machine.gpu.memory_gb_per_s * GB)
    # gradients go to the host, and weights come back, through pinned buffers
    moved = 2 * share * work.weight_bytes / (machine.gpu.pinned_gb_per_s * GB)
    return launches_s + moved + machine.gpus_per_node * touched / HOST_BYTES_PER_S


def hidden_s(machine: Machine, work: Work, passes_s: float) -> float:
    """Return the seconds of collectives that run beside forward and backward passes.

    passes_s: seconds of all micro batches.

    Stage 3 gathers and scatters beside all of its passes, the other stages reduce gradients beside
    backward passes: stage 2 in each micro batch, stages 0 and 1 in the last one.
    """
    if not work.overlaps:
        return 0.0
    if work.stage == 3:
        return min(machine.ring_s(ring_bytes(3, work)), passes_s)
    reduced = ring_bytes(work.stage, work) - updated_bytes(work.stage, work)
    beside = passes_s if work.stage == 2 else passes_s / work.grad_accum_steps
    return min(machine.ring_s(reduced), BACKWARD * beside)


def ring_bytes(stage: int, work: Work) -> float:
    """Return the bytes through every link in an optimizer step, in the limit of many ranks.

    stage: of ZeRO (Rajbhandari et al. 2020, section 7 on communication).

    Stage 0 reduces fp32 gradients once. Stage 1 reduces gradients once, stage 2 after every micro
    batch; both gather the updated weights. Stage 3 gathers weights in the forward and in the
    backward pass of every micro batch, and scatters gradients.
    """
    size, times = work.parameters * work.weight_bytes, work.grad_accum_steps
    return size * {0: 2, 1: 2 + 1, 2: 2 * times + 1, 3: 3 * times}[stage]


def updated_bytes(stage: int, work: Work) -> float:
    """Return the part of `ring_bytes` that gathers updated weights after the optimizer's step."""
    return work.parameters * work.weight_bytes * (1 if stage in (1, 2) else 0)


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """Size and time of a checkpoint."""

    size_bytes: int
    stall_s: float
    """Pause of the training, to gather tensors and copy them to host memory."""
    write_s: float
    """Time of writing in the background."""


def checkpoint_cost(
    config: Config, machine: Machine, parameters: int, averages: int
) -> CheckpointCost:
    """Predict a checkpoint: fp32 weights, two moments and the averages, written by all ranks."""
    size = parameters * FP32 * (3 + averages)
    gathered = 0.0 if config.deepspeed.stage == 0 else machine.ring_s(2 * size)
    return CheckpointCost(
        size_bytes=size,
        stall_s=gathered + size / machine.ranks / (machine.gpu.pageable_gb_per_s * GB),
        write_s=size / (config.plan.store_gib_per_s * GIB),
    )
