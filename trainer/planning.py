"""`trainer.plan`: print what a run will need and cost."""

from collections.abc import Iterator, Sequence

from models.config import ConditionerKind
from trainer.config import Config, Precision, Task
from trainer.costs import GIB
from trainer.forecast import Plan, Traced, check, make_plan, trace_step, with_options

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 3
"""How many the comparison shows: the largest that fit, and the next larger one, which does not."""

Row = tuple[str, str]


def plan(config: Config) -> None:
    """Print the plan of a config.

    Raises: ValueError that names the config path at fault.
    """
    check(config)
    traced = trace_step(config)
    print("\n".join(report(make_plan(config, traced))), flush=True)
    if config.plan.compare:
        print("\n".join(["", *comparison(config, traced)]), flush=True)


def report(plan: Plan) -> Iterator[str]:
    """Lines for a terminal."""
    config, layout = plan.config, plan.layout
    machine = f"{config.plan.nodes} x {config.plan.gpus_per_node} {config.plan.gpu}"
    yield f"{config.run.experiment} on {machine}, {layout.ranks} in all"
    sections = {
        "work": _work(plan),
        f"memory of a GPU: ZeRO stage {layout.stage}, micro batch "
        f"{config.train.micro_batch_size}, activation checkpointing "
        f"{'on' if config.unet.gradient_checkpointing else 'off'}": _memory(plan),
        f"an optimizer step: {config.train.global_batch_size} images": _time(plan),
        f"the run: train.max_steps={config.train.max_steps:,}": _run(plan),
    }
    for title, rows in sections.items():
        yield ""
        yield title
        yield from (f"  {name:<28}{value}" for name, value in rows)


def _work(plan: Plan) -> Iterator[Row]:
    traced, conditioner = plan.traced, plan.config.conditioner
    yield "trained parameters", f"{traced.sizes.total:,}"
    yield "frozen parameters", f"{traced.frozen.parameters:,}"
    model = traced.model_flops_per_image
    yield "FLOPs an image", f"{_tera(model)} forward and backward"
    again = plan.traced.flops_per_image - model - traced.frozen.flops_per_image
    if again:
        yield "", f"{_tera(again)} recomputing activations"
    if traced.frozen.flops_per_image:
        yield "", f"{_tera(traced.frozen.flops_per_image)} text encoder (none if data.store_text)"
    elif conditioner.kind is ConditionerKind.transformers:
        yield "", "the text encoder is not counted, nor are its weights: only its files know it"
    loss = plan.config.autoencoder.loss
    if plan.config.task is Task.autoencoder and (loss.perceptual_weight or loss.gan_weight):
        yield "", "the perceptual network and the discriminator are not counted"


def _memory(plan: Plan) -> Iterator[Row]:
    memory = plan.memory
    precision = plan.config.train.precision
    yield f"weights, {precision}", _gib(memory.weights)
    yield "first stage, text encoder", _gib(memory.frozen)
    yield "optimizer, fp32", _gib(memory.optimizer)
    yield f"EMA, {plan.layout.averages} x fp32", _gib(memory.ema)
    yield "gradients and buckets", _gib(memory.gradients)
    yield "activations", _gib(memory.activations)
    usable = f"of {plan.limit_bytes / GIB:.1f} ({plan.gpu.memory_gib} without plan.reserve_gib)"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield "peak", f"{_gib(memory.peak)} {usable}: {verdict}"
    yield "", f"reached in the {memory.moment}"
    if memory.host:
        yield "in host memory", f"{_gib(memory.host)} a GPU (deepspeed.offload_optimizer)"
    yield "largest micro batch", f"{plan.largest_micro_batch}"


def _time(plan: Plan) -> Iterator[Row]:
    time, layout, options = plan.time, plan.layout, plan.config.plan
    peak = plan.gpu.bf16_tflops
    if plan.config.train.precision is Precision.fp32:
        peak = plan.gpu.fp32_tflops
    rate = f"plan.mfu={options.mfu:g} of {peak:g} TFLOP/s, {plan.config.train.precision}"
    yield "products", f"{_seconds(time.compute_s)} at {rate}"
    place = "in host memory" if layout.offload else f"at {plan.gpu.memory_gb_per_s:g} GB/s"
    yield "optimizer", f"{_seconds(time.optimizer_s)} {place}"
    hidden = ", beside the products" if time.overlaps else ""
    yield "communication", f"{_seconds(time.communication_s)} {_links(plan)}{hidden}"
    yield "store", f"{_seconds(time.store_s)} at plan.store_gib_per_s={options.store_gib_per_s:g}"
    yield "together", f"{_seconds(time.total_s)} the store is read beside all else"
    yield "limit", plan.limit


def _links(plan: Plan) -> str:
    if plan.layout.ranks == 1:
        return "one GPU has none"
    if plan.config.plan.nodes == 1:
        return f"at {plan.gpu.link_gb_per_s:g} GB/s within the node"
    return f"at plan.network_gbit_per_s={plan.config.plan.network_gbit_per_s:g} a node"


def _run(plan: Plan) -> Iterator[Row]:
    config, saved = plan.config, plan.checkpoint
    rate = plan.images_per_s
    yield "images/s", f"{rate:,.0f}, {rate / plan.layout.ranks:,.1f} a GPU"
    read = rate * plan.sample_bytes / 1e6
    yield "read from the store", f"{read:,.1f} MB/s, {plan.sample_bytes:,} bytes a sample"
    yield "time", f"{_days(plan.days)}"
    yield "GPU-hours", f"{plan.gpu_hours:,.1f}"
    if config.plan.price_per_gpu_hour:
        price = config.plan.price_per_gpu_hour
        yield "cost", f"{plan.gpu_hours * price:,.0f} at plan.price_per_gpu_hour={price:g}"
    size = saved.size_bytes / GIB
    kept = config.checkpoint.keep
    yield "a checkpoint", f"{size:,.2f} GiB every {config.checkpoint.every:,} steps"
    yield "", f"training waits {saved.stall_s:.1f} s, then {saved.write_s:.1f} s in the background"
    yield "checkpoints on disk", f"{kept * size:,.2f} GiB (checkpoint.keep={kept})"


def comparison(config: Config, traced: Traced) -> Iterator[str]:
    """A table over ZeRO stages, activation checkpointing and micro batches."""
    yield _line(("stage", "checkpointing", "micro batch", "peak GiB", "images/s", "days", "limit"))
    for checkpointing in _checkpointing(config):
        other = with_options(config, checkpointing=checkpointing)
        if checkpointing != config.unet.gradient_checkpointing:
            traced = trace_step(other)
        for stage in _stages(config):
            for micro_batch in _micro_batches(with_options(other, stage=stage), traced):
                one = make_plan(with_options(other, stage=stage, micro_batch=micro_batch), traced)
                yield _line(
                    (
                        str(stage),
                        "on" if checkpointing else "off",
                        str(micro_batch),
                        f"{one.memory.peak / GIB:.1f}",
                        f"{one.images_per_s:,.0f}",
                        f"{one.days:.1f}",
                        one.limit,
                    )
                )


def _line(cells: Sequence[str]) -> str:
    widths = (7, 15, 13, 10, 10, 9)
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)) + (
        f"  {cells[-1]}"
    )


def _checkpointing(config: Config) -> tuple[bool, ...]:
    """The configured choice first, as its trace is there; a first stage has none."""
    if config.task is Task.autoencoder:
        return (False,)
    chosen = config.unet.gradient_checkpointing
    return (chosen, not chosen)


def _stages(config: Config) -> tuple[int, ...]:
    """Those that train in this precision (trainer.checks)."""
    return STAGES[1:] if config.train.precision is Precision.bf16 else STAGES


def _micro_batches(config: Config, traced: Traced) -> list[int]:
    """The largest that divide a rank's samples and fit, and the next larger one."""
    ranks = config.plan.nodes * config.plan.gpus_per_node
    each = config.train.global_batch_size // ranks
    divisors = [size for size in range(1, each + 1) if each % size == 0]
    # a rank that accumulates holds more than one that does not: each size is asked for itself
    fits = [make_plan(with_options(config, micro_batch=size), traced).fits for size in divisors]
    count = fits.index(False) if False in fits else len(divisors)
    return divisors[max(0, count - MICRO_BATCHES) : count + 1]


def _tera(flops: float) -> str:
    scale, unit = (1e12, "TFLOP") if flops >= 1e12 else (1e9, "GFLOP")
    return f"{flops / scale:.3g} {unit}"


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:8.3f} s "


def _days(days: float) -> str:
    hours = 24 * days
    if hours < 2:
        return f"{60 * hours:.1f} minutes"
    return f"{days:.1f} days" if days >= 2 else f"{hours:.1f} hours"
