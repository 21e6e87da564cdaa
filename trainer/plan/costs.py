"""Time of a training step on a machine: matrix products, memory, network, storage.

Every time is a number of bytes or operations divided by a rate of the machine; docs/planning.md has
the sources of the rates. Collectives use rings (Patarasuk and Yuan 2009): an all-reduce moves
2 (W-1)/W of its data through every link, an all-gather or a reduce-scatter half of that.
"""

from dataclasses import dataclass

from trainer.config import Config, PlanConfig, Precision
from trainer.runtime.devices import Gpu

GB = 10**9
GIB = 2**30
FP32 = 4
PCIE_BYTES_PER_S = 20 * GB
"""Rate of copies from a GPU to pageable host memory over PCIe 4.0."""
HOST_BYTES_PER_S = 200 * GB
"""Rate of a node's memory: eight channels of DDR4-3200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one rank in an optimizer step."""

    flops: float
    """FLOPs of all micro batches."""
    parameters: int
    weight_bytes: int
    grad_accum_steps: int
    averages: int
    read_bytes: int
    """Bytes of the samples of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step by cause."""

    compute_s: float
    optimizer_s: float
    communication_s: float
    store_s: float
    """Time of reading the samples of the step, in parallel to everything else."""
    overlaps: bool
    """Whether communication runs in parallel to the products (stage 3)."""

    @property
    def total_s(self) -> float:
        """Seconds of the step: the sum of its parts, or the storage if that is slower."""
        parts = (self.compute_s, self.communication_s)
        row = (max(parts) if self.overlaps else sum(parts)) + self.optimizer_s
        return max(row, self.store_s)

    @property
    def limit(self) -> str:
        """The part of the step that takes longest."""
        if self.store_s >= self.total_s:
            return "store"
        parts = {
            "compute": self.compute_s,
            "optimizer": self.optimizer_s,
            "communication": self.communication_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(config: Config, gpu: Gpu, work: Work) -> StepTime:
    """Predict the time of an optimizer step on plan.nodes with plan.gpus_per_node of these GPUs."""
    plan, stage = config.plan, config.deepspeed.stage
    peak = gpu.bf16_tflops if config.train.precision is Precision.bf16 else gpu.fp32_tflops
    ranks = plan.nodes * plan.gpus_per_node
    share = work.parameters / (1 if stage == 0 else ranks)
    # read and write weights, moments and averages; read the gradient
    touched = share * FP32 * (2 * (3 + work.averages) + 1)
    optimizer_s = touched / (gpu.memory_gb_per_s * GB)
    if config.deepspeed.offload_optimizer:
        # gradients go to the host, and weights come back
        moved = 2 * share * work.weight_bytes / PCIE_BYTES_PER_S
        optimizer_s = moved + plan.gpus_per_node * touched / HOST_BYTES_PER_S
    return StepTime(
        compute_s=work.flops / (peak * 1e12 * plan.mfu),
        optimizer_s=optimizer_s,
        communication_s=ring_s(plan, gpu, ring_bytes(stage, work)),
        store_s=work.read_bytes / (plan.store_gib_per_s * GIB),
        overlaps=stage == 3,
    )


def ring_bytes(stage: int, work: Work) -> float:
    """Return the bytes through every link in an optimizer step, in the limit of many ranks.

    stage: of ZeRO (Rajbhandari et al. 2020, section 7 on communication).

    Stage 0 reduces fp32 gradients once. Stage 1 reduces gradients once, stage 2 after every micro
    batch; both gather the updated weights. Stage 3 gathers weights in the forward and in the
    backward pass of every micro batch, and scatters gradients.
    """
    size, times = work.parameters * work.weight_bytes, work.grad_accum_steps
    return size * {0: 2, 1: 2 + 1, 2: 2 * times + 1, 3: 3 * times}[stage]


def ring_s(plan: PlanConfig, gpu: Gpu, sent: float) -> float:
    """Return the seconds of a ring over all GPUs: the slower of network and GPU links.

    sent: bytes through every link, in the limit of many ranks.
    """
    within = (plan.gpus_per_node - 1) / plan.gpus_per_node / (gpu.link_gb_per_s * GB)
    between = (plan.nodes - 1) / plan.nodes / (plan.network_gbit_per_s * GB / 8)
    return sent * max(within, between)


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """Size and time of a checkpoint."""

    size_bytes: int
    stall_s: float
    """Pause of the training, to gather tensors and copy them to host memory."""
    write_s: float
    """Time of writing in the background."""


def checkpoint_cost(config: Config, gpu: Gpu, parameters: int, averages: int) -> CheckpointCost:
    """Predict a checkpoint: fp32 weights, two moments and the averages, written by all ranks."""
    plan, ranks = config.plan, config.plan.nodes * config.plan.gpus_per_node
    size = parameters * FP32 * (3 + averages)
    gathered = 0.0 if config.deepspeed.stage == 0 else ring_s(plan, gpu, 2 * size)
    return CheckpointCost(
        size_bytes=size,
        stall_s=gathered + size / ranks / PCIE_BYTES_PER_S,
        write_s=size / (plan.store_gib_per_s * GIB),
    )
