"""Print memory, time and cost of a run."""

import sys
from collections.abc import Iterator
from pathlib import Path

from data.storage.documents import read_json
from trainer.checkpoints.identity import check_resume
from trainer.checkpoints.reader import MAX_STATE_BYTES, STATE
from trainer.checkpoints.state import parse_state
from trainer.config import Config
from trainer.engine.optim import describe_peak
from trainer.plan.comparison import better_forecast, better_lines, comparison_lines
from trainer.plan.costs import GIB
from trainer.plan.forecast import Forecast, check, make_forecast, trace_step
from trainer.plan.machine import software_of
from trainer.runs.paths import newest_checkpoint

Row = tuple[str, str]


def plan(config: Config) -> None:
    """Print the forecast of a run; a line says if the run folder holds another run.

    Raises: ValueError that names the wrong option.
    """
    check(config)
    if other := _other_run(config):
        print(f"warning: {other}", file=sys.stderr, flush=True)
    traced = trace_step(config)
    configured = make_forecast(config, traced)
    print("\n".join(summary_lines(configured)), flush=True)
    if better := better_forecast(configured):
        print("\n".join(["", *better_lines(configured, better)]), flush=True)
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
    yield "frozen networks", _gib(memory.frozen)
    yield "optimizer, fp32", _gib(memory.optimizer)
    yield f"EMA, {forecast.layout.averages} x fp32", _gib(memory.ema)
    yield "gradients and buckets", _gib(memory.gradients)
    yield "activations", _gib(memory.activations)
    whole = forecast.machine.gpu.memory_gib
    usable = f"of {forecast.limit_bytes / GIB:.1f} ({whole} without plan.reserve_gib)"
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    yield "peak", f"{_gib(memory.peak)} {usable}: {verdict}"
    yield "", f"reached in the {memory.phase}"
    if memory.host:
        yield "in host memory", f"{_gib(memory.host)} a GPU (deepspeed.offload_optimizer)"
    each = forecast.config.train.global_batch_size // forecast.layout.ranks
    largest = forecast.largest_micro_batch
    yield "largest micro batch", f"{largest} that divides a GPU's {each} samples and fits"


def _time(forecast: Forecast) -> Iterator[Row]:
    time, layout, options = forecast.time, forecast.layout, forecast.config.plan
    machine, software = forecast.machine, software_of(forecast.config)
    rate = f"plan.mfu={machine.mfu:.3g} of {machine.peak_tflops:g} TFLOP/s, {software}"
    yield "products", f"{_seconds(time.compute_s)} at {rate}"
    if forecast.traced.frozen.flops_per_image:
        share = forecast.traced.frozen.flops_per_image / forecast.traced.flops_per_image
        yield "", f"{_seconds(share * time.compute_s)} of it in the conditioner"
    operators = forecast.traced.traces[0].operators
    yield "launches", f"{_seconds(time.launch_s)} of {operators:,} operators a micro batch"
    place = "in host memory" if layout.offload else f"at {machine.gpu.memory_gb_per_s:g} GB/s"
    yield "optimizer", f"{_seconds(time.optimizer_s)} {place}, and its own launches"
    yield "communication", f"{_seconds(time.communication_s)} {_links(forecast)}"
    if time.hidden_s:
        yield "", f"{_seconds(time.hidden_s)} of it beside the products"
    yield "store", f"{_seconds(time.store_s)} at plan.store_gib_per_s={options.store_gib_per_s:g}"
    yield "together", f"{_seconds(time.total_s)} the store is read beside all else"
    yield "limit", forecast.limit


def _links(forecast: Forecast) -> str:
    if forecast.layout.ranks == 1:
        return "one GPU has none"
    if forecast.config.plan.nodes == 1:
        return f"at {forecast.machine.gpu.link_gb_per_s:g} GB/s within the node"
    return f"at plan.network_gbit_per_s={forecast.machine.network_gbit_per_s:g} a node"


def _run(forecast: Forecast) -> Iterator[Row]:
    config, saved = forecast.config, forecast.checkpoint
    yield "learning rate", describe_peak(config.optim, config.train.global_batch_size)
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
