"""Forecast of a run on a machine from a traced step; needs no GPU, data or weights."""

from dataclasses import dataclass, replace

import torch

from data.order.batches import check_batch
from models.config import AttentionBackend
from models.layers.attention import reference_attention, sdpa_for
from models.layers.blocks import use_attention
from trainer.checks import grad_accum_steps
from trainer.config import Config, Precision
from trainer.engine.averages import averages
from trainer.engine.buckets import gradient_buckets
from trainer.plan.costs import (
    DEEPSPEED_OPERATORS,
    GATHER_OPERATORS,
    GIB,
    CheckpointCost,
    StepTime,
    Work,
    checkpoint_cost,
    step_time,
)
from trainer.plan.evaluation import (
    EvaluationCost,
    TracedEvaluation,
    evaluation_cost,
    trace_evaluation,
)
from trainer.plan.machine import Machine, machine_of
from trainer.plan.memory import (
    FP32,
    Layout,
    Memory,
    Sizes,
    at_micro_batch,
    largest_micro_batch,
    predict,
)
from trainer.plan.tracing import Trace, fake_mode, fake_module, trace
from trainer.train.task import Frozen, StepPlan
from trainer.train.tasks import plan_step

TRACED_SIZES = (2, 4)
"""Sizes of the two traced micro batches; others are extrapolated linearly. Size 1 would break this:
there some reshapes are views, without bytes of their own."""
BF16 = 2


@dataclass(frozen=True, slots=True)
class TracedStep:
    """The traced training step."""

    sizes: Sizes
    step: StepPlan
    traces: tuple[Trace, Trace]
    model_flops_per_image: float
    """FLOPs of the trained network, forward and backward, without recomputation."""
    evaluation: TracedEvaluation | None
    """The networks of an evaluation; None without."""

    @property
    def frozen(self) -> Frozen:
        """The frozen networks beside the trained one."""
        return self.step.frozen

    @property
    def flops_per_image(self) -> float:
        """FLOPs of an image, with recomputation and frozen networks."""
        return self.traces[0].flops / self.traces[0].micro_batch + self.frozen.flops_per_image


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory, time and cost of a run on a machine."""

    config: Config
    machine: Machine
    traced: TracedStep
    layout: Layout
    memory: Memory
    limit_bytes: float
    sample_bytes: int
    time: StepTime
    checkpoint: CheckpointCost
    evaluation: EvaluationCost | None
    """None without evaluations."""

    @property
    def fits(self) -> bool:
        """Whether the configured micro batch and an evaluation fit into the memory."""
        evaluating = 0 if self.evaluation is None else self.evaluation.peak_bytes
        return max(self.memory.peak, evaluating) <= self.limit_bytes

    @property
    def largest_micro_batch(self) -> int:
        """Largest divisor of a rank's samples that fits; 0 if none does."""
        traced, samples = self.traced, self.config.train.global_batch_size // self.layout.ranks
        return largest_micro_batch(
            *traced.traces, traced.sizes, self.layout, self.limit_bytes, samples=samples
        )

    @property
    def images_per_s(self) -> float:
        """Throughput of all ranks together, without pauses for checkpoints."""
        return self.config.train.global_batch_size / self.time.total_s

    @property
    def days(self) -> float:
        """Days for train.max_steps, with the pauses for checkpoints and evaluations."""
        train = self.config.train
        pauses_s = train.max_steps / self.config.checkpoint.every * self.checkpoint.stall_s
        if self.evaluation is not None:
            # the untrained network is measured, too
            pauses_s += (1 + train.max_steps / self.config.eval.every) * self.evaluation.seconds
        return (train.max_steps * self.time.total_s + pauses_s) / 86_400

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the run: its hours times the number of GPUs."""
        return 24 * self.days * self.layout.ranks

    @property
    def limit(self) -> str:
        """The limit of the run: memory, or the part of a step that takes longest."""
        return self.time.limit if self.fits else "memory"


def check(config: Config) -> None:
    """Check the batch size.

    Raises: ValueError for a batch that does not divide.
    """
    plan, train = config.plan, config.train
    ranks = plan.nodes * plan.gpus_per_node
    check_batch(train.global_batch_size, ranks=ranks, micro_batch=train.micro_batch_size)


def trace_step(config: Config, *, device: str = "cuda") -> TracedStep:
    """Trace the training step of the configured task, on fake tensors.

    device: the type of device whose attention kernels are traced.
    """
    step = plan_step(config)
    first, second = (_trace(config, step, size, device) for size in TRACED_SIZES)
    plain = first
    if config.unet.gradient_checkpointing:
        without = with_options(config, checkpointing=False)
        plain = _trace(without, plan_step(without), TRACED_SIZES[0], device)
    each = plain.flops / plain.micro_batch
    return TracedStep(_sizes(step), step, (first, second), each, trace_evaluation(config, step))


def trace_one(config: Config, step: StepPlan) -> tuple[Trace, Sizes]:
    """Trace one small micro batch of a step, as on a GPU; return its weights' sizes, too."""
    return _trace(config, step, TRACED_SIZES[0], "cuda"), _sizes(step)


def _trace(config: Config, step: StepPlan, micro_batch: int, device: str) -> Trace:
    # xformers needs a GPU; SDPA keeps the same tensors for the backward pass
    attention = sdpa_for(torch.device(device))
    if config.unet.attention_backend is AttentionBackend.reference:
        attention = reference_attention
    mode = fake_mode()
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
    module = fake_module(step.build_module, dtype, mode)
    use_attention(module, attention)
    with mode:
        return trace(module, lambda: step.loss(module, micro_batch), micro_batch)


def _sizes(step: StepPlan) -> Sizes:
    with torch.device("meta"):
        return Sizes.of(step.build_module())


def layout_of(config: Config, traced: TracedStep, *, ranks: int) -> Layout:
    """Return the layout of the configured run on `ranks` ranks."""
    bf16 = config.train.precision is Precision.bf16
    return Layout(
        stage=config.deepspeed.stage,
        ranks=ranks,
        weight_bytes=BF16 if bf16 else FP32,
        grad_accum_steps=grad_accum_steps(config, ranks),
        averages=len(averages(config.ema)),
        frozen_bytes=traced.frozen.bytes,
        offload=config.deepspeed.offload_optimizer,
    )


def memory_of(config: Config, traced: TracedStep, layout: Layout) -> Memory:
    """Predict the memory of a GPU with the configured micro batch."""
    return predict(
        at_micro_batch(*traced.traces, config.train.micro_batch_size), traced.sizes, layout
    )


def make_forecast(config: Config, traced: TracedStep) -> Forecast:
    """Predict memory, time and cost of the traced step on the configured machine."""
    machine = machine_of(config)
    layout = layout_of(config, traced, ranks=machine.ranks)
    limit = (machine.gpu.memory_gib - config.plan.reserve_gib) * GIB
    work = work_of(config, traced, layout)
    memory, evaluation = memory_of(config, traced, layout), None
    if traced.evaluation is not None:
        evaluation = evaluation_cost(config, machine, traced.evaluation, traced.sizes, memory)
    return Forecast(
        config=config,
        machine=machine,
        traced=traced,
        layout=layout,
        memory=memory,
        limit_bytes=limit,
        sample_bytes=traced.step.sample_bytes,
        time=step_time(machine, work, store_gib_per_s=config.plan.store_gib_per_s),
        checkpoint=checkpoint_cost(config, machine, traced.sizes.total, layout.averages),
        evaluation=evaluation,
    )


def work_of(config: Config, traced: TracedStep, layout: Layout) -> Work:
    """Return the work of a rank in an optimizer step of this layout."""
    batch, stage = config.train.global_batch_size, layout.stage
    gathers = GATHER_OPERATORS * traced.sizes.tensors
    buckets = gradient_buckets(
        traced.sizes.total, stage=stage, ranks=layout.ranks, offload=layout.offload
    )
    return Work(
        stage=stage,
        flops=traced.flops_per_image * (batch // layout.ranks),
        operators=traced.traces[0].operators + (gathers if stage == 3 else 0),
        optimizer_operators=DEEPSPEED_OPERATORS * traced.sizes.tensors if stage else 0,
        parameters=traced.sizes.total,
        weight_bytes=layout.weight_bytes,
        grad_accum_steps=layout.grad_accum_steps,
        averages=layout.averages,
        read_bytes=batch * traced.step.sample_bytes,
        overlaps=buckets.overlaps,
        offload=layout.offload,
    )


def with_options(
    config: Config,
    *,
    stage: int | None = None,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
) -> Config:
    """Return the config with some options replaced."""
    unet, deepspeed, train = config.unet, config.deepspeed, config.train
    if stage is not None:
        deepspeed = replace(deepspeed, stage=stage)
    if checkpointing is not None:
        unet = replace(unet, gradient_checkpointing=checkpointing)
    if micro_batch is not None:
        train = replace(train, micro_batch_size=micro_batch)
    return replace(config, unet=unet, deepspeed=deepspeed, train=train)
