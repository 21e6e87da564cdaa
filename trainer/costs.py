"""How long a step takes on a machine, and what it takes it: products, memory, network, store.

Every figure is bytes or operations divided by a rate of the machine; docs/planning.md has the
rates' sources. Collectives move what a ring does (Patarasuk and Yuan 2009): an all-reduce 2 (W-1)/W
of its data through every link, an all-gather or a reduce-scatter half of that.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import conf
from trainer.config import Config, PlanConfig, Precision, Task

GB = 10**9
GIB = 2**30
FP32 = 4
PCIE_BYTES_PER_S = 20 * GB
"""From GPU to host memory, pageable, PCIe 4.0."""
HOST_BYTES_PER_S = 200 * GB
"""Of a node's memory: eight channels of DDR4-3200."""
MEMBER_BYTES = 3584
"""Of a latent sample beside its tensors: tar headers, caption, JSON, padding to 512 bytes."""
TAR_HEADER_BYTES = 512 + 128
"""Of a tensor in a tar: the member's header and numpy's."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of conf/plan/gpus.yaml."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float


def find_gpu(name: str) -> Gpu:
    """Raises ValueError that lists the names."""
    table = OmegaConf.load(Path(conf.__path__[0]) / "plan" / "gpus.yaml")
    assert isinstance(table, DictConfig)
    if name not in table:
        raise ValueError(f"plan.gpu={name} is none of {', '.join(map(str, table))}")
    return Gpu(**table[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an optimizer step of one rank consists of."""

    flops: float
    """Of all micro batches."""
    parameters: int
    weight_bytes: int
    grad_accum_steps: int
    averages: int
    read_bytes: int
    """Of the samples of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step, by what they are spent on."""

    compute_s: float
    optimizer_s: float
    communication_s: float
    store_s: float
    """Reading its samples, which goes on beside all else."""
    overlaps: bool
    """Whether communication goes on beside the products (stage 3)."""

    @property
    def total_s(self) -> float:
        """What is in a row, or the store where that is slower."""
        parts = (self.compute_s, self.communication_s)
        row = (max(parts) if self.overlaps else sum(parts)) + self.optimizer_s
        return max(row, self.store_s)

    @property
    def limit(self) -> str:
        """What takes longest."""
        if self.store_s >= self.total_s:
            return "store"
        parts = {
            "compute": self.compute_s,
            "optimizer": self.optimizer_s,
            "communication": self.communication_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(config: Config, gpu: Gpu, work: Work) -> StepTime:
    """Of the configured run on plan.nodes of these GPUs."""
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
    """Bytes through every link in an optimizer step, of very many ranks.

    Stage 0 reduces fp32 gradients once; 1 reduces once, and 2 for every micro batch, by
    all-reduces, and both gather the updated weights; 3 gathers weights in the forward and in the
    backward pass of every micro batch, and scatters gradients.
    """
    size, times = work.parameters * work.weight_bytes, work.grad_accum_steps
    return size * {0: 2, 1: 2 + 1, 2: 2 * times + 1, 3: 3 * times}[stage]


def ring_s(plan: PlanConfig, gpu: Gpu, sent: float) -> float:
    """Seconds to send that through the slower of a node's network and a GPU's links."""
    within = (plan.gpus_per_node - 1) / plan.gpus_per_node / (gpu.link_gb_per_s * GB)
    between = (plan.nodes - 1) / plan.nodes / (plan.network_gbit_per_s * GB / 8)
    return sent * max(within, between)


def sample_bytes(config: Config, context_tokens: int) -> int:
    """What a sample of the training set takes in its shard; of an image the most, uncompressed.

    context_tokens: of the text encoder, for data.store_text.
    """
    stage, side = config.autoencoder, config.data.image_size
    if config.task is Task.autoencoder:
        return stage.in_channels * side**2
    latent = 2 * stage.latent_channels * (side // stage.downsample_factor) ** 2 * 2
    size = (1 + config.data.flip) * (latent + TAR_HEADER_BYTES) + MEMBER_BYTES
    if config.data.store_text:
        size += context_tokens * config.conditioner.width * 2 + TAR_HEADER_BYTES
    return size


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """What a checkpoint takes."""

    size_bytes: int
    stall_s: float
    """Training stands still while tensors are gathered and copied to host memory."""
    write_s: float
    """In the background."""


def checkpoint_cost(config: Config, gpu: Gpu, parameters: int, averages: int) -> CheckpointCost:
    """fp32 weights, two moments and the averages, spread over the ranks that write them."""
    plan, ranks = config.plan, config.plan.nodes * config.plan.gpus_per_node
    size = parameters * FP32 * (3 + averages)
    gathered = 0.0 if config.deepspeed.stage == 0 else ring_s(plan, gpu, 2 * size)
    return CheckpointCost(
        size_bytes=size,
        stall_s=gathered + size / ranks / PCIE_BYTES_PER_S,
        write_s=size / (plan.store_gib_per_s * GIB),
    )
