"""Print memory, time and cost of a run."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.storage.documents import read_json
from trainer.checkpoints.identity import check_resume
from trainer.checkpoints.reader import MAX_STATE_BYTES, STATE
from trainer.checkpoints.state import parse_state
from trainer.config import Config, Precision
from trainer.plan.costs import GIB
from trainer.plan.forecast import (
    Forecast,
    TracedStep,
    check,
    make_forecast,
    trace_step,
    with_options,
)
from trainer.runs.paths import newest_checkpoint
from trainer.train.tasks import plan_step

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 3
"""Most micro batches in the comparison that fit; it also shows the next larger one."""

Row = tuple[str, str]


def plan(config: Config) -> None:
    """Print the forecast of a run; a line says if the run folder holds another run.

    Raises: ValueError that names the wrong option.
    """
    check(config)
    if other := _other_run(config):
        print(f"warning: {other}", file=sys.stderr, flush=True)
    traced = trace_step(config)
    print("\n".join(summary_lines(make_forecast(config, traced))), flush=True)
    if config.plan.compare:
        print("\n".join(["", *comparison_lines(config, traced)]), flush=True)


def _other_run(config: Config) -> str:
    """Return a line if the newest checkpoint of the run is of another run than the config's."""
    path = newest_checkpoint(Path(config.run.dir))
    if path is None:
        return ""
    try:
        state = parse_state(read_json(path / STATE, limit=MAX_STATE_BYTES, below=path))
    except (OSError, ValueError):  # a training would go on from the one before
        return ""
    try:
        check_resume(config, state.config, path)
    except ValueError as error:
        return str(error)
    return ""


def summary_lines(forecast: Forecast) -> Iterator[str]:
    """Yield the lines of a forecast for a terminal."""
    config, layout = forecast.config, forecast.layout
    machine = f"{config.plan.nodes} x {config.plan.gpus_per_node} {config.plan.gpu}"
    yield f"{config.run.experiment} on {machine}, {layout.ranks} in all"
    sections = {
        "work": _work(forecast),
        f"memory of a GPU: ZeRO stage {layout.stage}, micro batch "
        f"{config.train.micro_batch_size}, activation checkpointing "
        f"{'on' if config.unet.gradient_checkpointing else 'off'}": _memory(forecast),
        f"an optimizer step: {config.train.global_batch_size} images": _time(forecast),
        f"the run: train.max_steps={config.train.max_steps:,}": _run(forecast),
    }
    for title, rows in sections.items():
        yield ""
        yield title
        yield from (f"  {name:<28}{value}" for name, value in rows)


def _work(forecast: Forecast) -> Iterator[Row]:
    traced = forecast.traced
    yield "trained parameters", f"{traced.sizes.total:,}"
    yield "frozen parameters", f"{traced.frozen.parameters:,}"
    model = traced.model_flops_per_image
    yield "FLOPs an image", f"{_tera(model)} forward and backward"
    again = forecast.traced.flops_per_image - model - traced.frozen.flops_per_image
    if again:
        yield "", f"{_tera(again)} recomputing activations"
    if traced.frozen.flops_per_image:
        yield "", f"{_tera(traced.frozen.flops_per_image)} conditioner (none if data.store_text)"
    for part in traced.step.not_counted:
        yield "", f"not counted: {part}"


def _memory(forecast: Forecast) -> Iterator[Row]:
    memory = forecast.memory
    precision = forecast.config.train.precision
    yield f"weights, {precision}", _gib(memory.weights)
    yield "text encoder", _gib(memory.frozen)
    yield "optimizer, fp32", _gib(memory.optimizer)
    yield f"EMA, {forecast.layout.averages} x fp32", _gib(memory.ema)
    yield "gradients and buckets", _gib(memory.gradients)
    yield "activations", _gib(memory.activations)
    usable = (
        f"of {forecast.limit_bytes / GIB:.1f} ({forecast.gpu.memory_gib} without plan.reserve_gib)"
    )
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    yield "peak", f"{_gib(memory.peak)} {usable}: {verdict}"
    yield "", f"reached in the {memory.phase}"
    if memory.host:
        yield "in host memory", f"{_gib(memory.host)} a GPU (deepspeed.offload_optimizer)"
    yield "largest micro batch", f"{forecast.largest_micro_batch}"


def _time(forecast: Forecast) -> Iterator[Row]:
    time, layout, options = forecast.time, forecast.layout, forecast.config.plan
    peak = forecast.gpu.bf16_tflops
    if forecast.config.train.precision is Precision.fp32:
        peak = forecast.gpu.fp32_tflops
    rate = f"plan.mfu={options.mfu:g} of {peak:g} TFLOP/s, {forecast.config.train.precision}"
    yield "products", f"{_seconds(time.compute_s)} at {rate}"
    place = "in host memory" if layout.offload else f"at {forecast.gpu.memory_gb_per_s:g} GB/s"
    yield "optimizer", f"{_seconds(time.optimizer_s)} {place}"
    hidden = ", beside the products" if time.overlaps else ""
    yield "communication", f"{_seconds(time.communication_s)} {_links(forecast)}{hidden}"
    yield "store", f"{_seconds(time.store_s)} at plan.store_gib_per_s={options.store_gib_per_s:g}"
    yield "together", f"{_seconds(time.total_s)} the store is read beside all else"
    yield "limit", forecast.limit


def _links(forecast: Forecast) -> str:
    if forecast.layout.ranks == 1:
        return "one GPU has none"
    if forecast.config.plan.nodes == 1:
        return f"at {forecast.gpu.link_gb_per_s:g} GB/s within the node"
    return f"at plan.network_gbit_per_s={forecast.config.plan.network_gbit_per_s:g} a node"


def _run(forecast: Forecast) -> Iterator[Row]:
    config, saved = forecast.config, forecast.checkpoint
    rate = forecast.images_per_s
    yield "images/s", f"{rate:,.0f}, {rate / forecast.layout.ranks:,.1f} a GPU"
    read = rate * forecast.sample_bytes / 1e6
    yield "read from the store", f"{read:,.1f} MB/s, {forecast.sample_bytes:,} bytes a sample"
    yield "time", f"{_days(forecast.days)}"
    yield "GPU-hours", f"{forecast.gpu_hours:,.1f}"
    if config.plan.price_per_gpu_hour:
        price = config.plan.price_per_gpu_hour
        yield "cost", f"{forecast.gpu_hours * price:,.0f} at plan.price_per_gpu_hour={price:g}"
    if forecast.evaluation is not None:
        one, every = forecast.evaluation, config.eval.every
        yield "an evaluation", f"{one.peak_bytes / GIB:,.1f} GiB at its peak, {one.phase}"
        yield "", f"{one.seconds:,.0f} s every {every:,} steps, without feature networks"
    size = saved.size_bytes / GIB
    kept = config.checkpoint.keep
    yield "a checkpoint", f"{size:,.2f} GiB every {config.checkpoint.every:,} steps"
    yield "", f"training waits {saved.stall_s:.1f} s, then {saved.write_s:.1f} s in the background"
    yield "checkpoints on disk", f"{kept * size:,.2f} GiB (checkpoint.keep={kept})"


def comparison_lines(config: Config, traced: TracedStep) -> Iterator[str]:
    """Yield the lines of a table over ZeRO stages, activation checkpointing, micro batches."""
    yield _line(("stage", "checkpointing", "micro batch", "peak GiB", "images/s", "days", "limit"))
    for checkpointing in _checkpointing(config):
        other = with_options(config, checkpointing=checkpointing)
        if checkpointing != config.unet.gradient_checkpointing:
            traced = trace_step(other)
        for stage in _stages(config):
            for micro_batch in _micro_batches(with_options(other, stage=stage), traced):
                one = make_forecast(
                    with_options(other, stage=stage, micro_batch=micro_batch), traced
                )
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
    """Return the choices of activation checkpointing; the configured one is traced already."""
    if not plan_step(config).checkpointing:
        return (False,)
    chosen = config.unet.gradient_checkpointing
    return (chosen, not chosen)


def _stages(config: Config) -> tuple[int, ...]:
    """Return the ZeRO stages that allow the configured precision."""
    return STAGES[1:] if config.train.precision is Precision.bf16 else STAGES


def _micro_batches(config: Config, traced: TracedStep) -> list[int]:
    """Return the largest divisors of a rank's samples that fit, and the next larger one."""
    ranks = config.plan.nodes * config.plan.gpus_per_node
    each = config.train.global_batch_size // ranks
    divisors = [size for size in range(1, each + 1) if each % size == 0]
    # gradient accumulation needs memory, too: a larger size may fit if a smaller one does not
    fits = [make_forecast(with_options(config, micro_batch=size), traced).fits for size in divisors]
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
