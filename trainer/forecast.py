"""What a run will need: its step traced, and put on a machine; no GPU, data or weights."""

from dataclasses import dataclass, replace

import torch

from models.attention import choose_attention
from models.config import AttentionBackend
from trainer.averages import averages
from trainer.checks import grad_accum_steps
from trainer.config import Config, Precision
from trainer.costs import (
    GIB,
    CheckpointCost,
    Gpu,
    StepTime,
    Work,
    checkpoint_cost,
    find_gpu,
    sample_bytes,
    step_time,
)
from trainer.memory import (
    FP32,
    Layout,
    Memory,
    Sizes,
    at_micro_batch,
    largest_micro_batch,
    predict,
)
from trainer.tasks.planned import Frozen, build_module, frozen_networks, planned
from trainer.tracing import Trace, fake_mode, fake_module, trace

TRACED = (2, 4)
"""Two micro batches, from which all others follow. At 1, some views are no copies."""
BF16 = 2


@dataclass(frozen=True, slots=True)
class Traced:
    """All that a plan needs to know of the code."""

    sizes: Sizes
    frozen: Frozen
    traces: tuple[Trace, Trace]
    model_flops_per_image: float
    """Of the trained network, without recomputation."""

    @property
    def flops_per_image(self) -> float:
        """With the recomputation and the text encoder."""
        return self.traces[0].flops / self.traces[0].micro_batch + self.frozen.flops_per_image


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    config: Config
    gpu: Gpu
    traced: Traced
    layout: Layout
    memory: Memory
    limit_bytes: float
    largest_micro_batch: int
    sample_bytes: int
    time: StepTime
    checkpoint: CheckpointCost

    @property
    def fits(self) -> bool:
        """Whether the configured micro batch does."""
        return self.memory.peak <= self.limit_bytes

    @property
    def images_per_s(self) -> float:
        """Of the whole job, while it trains."""
        return self.config.train.global_batch_size / self.time.total_s

    @property
    def days(self) -> float:
        """For train.max_steps, pauses for checkpoints included."""
        train = self.config.train
        saves = train.max_steps / self.config.checkpoint.every
        return (train.max_steps * self.time.total_s + saves * self.checkpoint.stall_s) / 86_400

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return 24 * self.days * self.layout.ranks

    @property
    def limit(self) -> str:
        """What keeps the run from being faster."""
        return self.time.limit if self.fits else "memory"


def check(config: Config) -> None:
    """Raise ValueError where the batch does not divide, or a rate is not positive."""
    plan, train = config.plan, config.train
    find_gpu(plan.gpu)
    for name in ("nodes", "gpus_per_node", "mfu", "network_gbit_per_s", "store_gib_per_s"):
        if getattr(plan, name) <= 0:
            raise ValueError(f"plan.{name}={getattr(plan, name)} must be positive")
    ranks = plan.nodes * plan.gpus_per_node
    if train.global_batch_size % ranks:
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size} does not divide into "
            f"plan.nodes x plan.gpus_per_node = {ranks} ranks"
        )
    each = train.global_batch_size // ranks
    if each % train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size={train.micro_batch_size} does not divide the {each} samples "
            f"of a rank (train.global_batch_size={train.global_batch_size} on {ranks} ranks): "
            f"set it to {_divisor_at_most(each, train.micro_batch_size)}"
        )


def trace_step(config: Config, *, device: str = "cuda") -> Traced:
    """Trace the training step of the configured task for this kind of device."""
    backend = config.unet.attention_backend
    if backend is not AttentionBackend.reference:
        # xformers needs its device; SDPA keeps as much for the backward pass
        backend = AttentionBackend.sdpa
    choose_attention(backend, torch.device(device), torch.float32, [])
    frozen = frozen_networks(config)
    traces = [_trace(config, frozen, size) for size in TRACED]
    plain = traces[0]
    if config.unet.gradient_checkpointing:
        plain = _trace(with_options(config, checkpointing=False), frozen, TRACED[0])
    with torch.device("meta"):
        sizes = Sizes.of(build_module(config))
    return Traced(sizes, frozen, (traces[0], traces[1]), plain.flops / plain.micro_batch)


def _trace(config: Config, frozen: Frozen, micro_batch: int) -> Trace:
    mode = fake_mode()
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
    module = fake_module(lambda: build_module(config), dtype, mode)
    task = planned(config, module, frozen)
    with mode:
        return trace(module, lambda: task.planned_loss(micro_batch), micro_batch)


def layout_of(config: Config, traced: Traced, *, ranks: int) -> Layout:
    """How the engine spreads the configured run over so many ranks."""
    bf16 = config.train.precision is Precision.bf16
    return Layout(
        stage=config.deepspeed.stage,
        ranks=ranks,
        weight_bytes=BF16 if bf16 else FP32,
        grad_accum_steps=grad_accum_steps(config, ranks),
        averages=len(averages(config.ema)),
        frozen_bytes=traced.frozen.parameters * FP32,
        offload=config.deepspeed.offload_optimizer,
    )


def memory_of(config: Config, traced: Traced, layout: Layout) -> Memory:
    """Of the configured micro batch."""
    return predict(
        at_micro_batch(*traced.traces, config.train.micro_batch_size), traced.sizes, layout
    )


def make_plan(config: Config, traced: Traced) -> Plan:
    """Put the trace on the machine."""
    gpu = find_gpu(config.plan.gpu)
    layout = layout_of(config, traced, ranks=config.plan.nodes * config.plan.gpus_per_node)
    limit = (gpu.memory_gib - config.plan.reserve_gib) * GIB
    each = config.train.global_batch_size // layout.ranks
    sample = sample_bytes(config, traced.frozen.context_tokens)
    work = Work(
        flops=traced.flops_per_image * each,
        parameters=traced.sizes.total,
        weight_bytes=layout.weight_bytes,
        grad_accum_steps=layout.grad_accum_steps,
        averages=layout.averages,
        read_bytes=config.train.global_batch_size * sample,
    )
    return Plan(
        config=config,
        gpu=gpu,
        traced=traced,
        layout=layout,
        memory=memory_of(config, traced, layout),
        limit_bytes=limit,
        largest_micro_batch=largest_micro_batch(*traced.traces, traced.sizes, layout, limit),
        sample_bytes=sample,
        time=step_time(config, gpu, work),
        checkpoint=checkpoint_cost(config, gpu, traced.sizes.total, layout.averages),
    )


def with_options(
    config: Config,
    *,
    stage: int | None = None,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
) -> Config:
    """The config with some of these replaced."""
    unet, deepspeed, train = config.unet, config.deepspeed, config.train
    if stage is not None:
        deepspeed = replace(deepspeed, stage=stage)
    if checkpointing is not None:
        unet = replace(unet, gradient_checkpointing=checkpointing)
    if micro_batch is not None:
        train = replace(train, micro_batch_size=micro_batch)
    return replace(config, unet=unet, deepspeed=deepspeed, train=train)


def _divisor_at_most(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
