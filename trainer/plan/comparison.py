"""The same run with other ZeRO stages, activation checkpointing and micro batches."""

from collections.abc import Iterator, Sequence

from trainer.config import Config, Precision
from trainer.plan.costs import GIB
from trainer.plan.forecast import Forecast, TracedStep, make_forecast, trace_step, with_options
from trainer.plan.memory import divisors
from trainer.train.tasks import plan_step

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 3
"""Most micro batches in the comparison that fit; it also shows the next larger one."""
WORTH = 1.1
"""Speed of a row, relative to the configured one, from which the plan points to it."""
HEAD = ("stage", "checkpointing", "micro batch", "peak GiB", "images/s", "days", "limit")


def better_forecast(configured: Forecast) -> Forecast | None:
    """Return the fastest row that fits if the configured one does not, or is over 10 % slower.

    Without activation checkpointing, rows with it are tried only if the configured one does not
    fit: recomputation makes a step slower.
    """
    config, traced = configured.config, configured.traced
    choices = _checkpointing(config)
    if not config.unet.gradient_checkpointing and configured.fits:
        choices = (False,)
    rows = [one for choice in choices for one in _forecasts(config, traced, choice) if one.fits]
    best = max(rows, key=lambda one: one.images_per_s, default=None)
    if best is None or (configured.fits and best.images_per_s <= WORTH * configured.images_per_s):
        return None
    return best


def better_lines(configured: Forecast, best: Forecast) -> Iterator[str]:
    """Yield lines that show the better row under the configured one."""
    if configured.fits:
        gain = best.images_per_s / configured.images_per_s - 1
        yield f"a row that fits is {gain:.0%} faster than the configured one:"
    else:
        yield "the configured row does not fit; the fastest one that fits:"
    yield _line(HEAD)
    yield from (_row(one) for one in (configured, best))
    deepspeed, train, unet = best.config.deepspeed, best.config.train, best.config.unet
    yield (
        f"  deepspeed.stage={deepspeed.stage} train.micro_batch_size={train.micro_batch_size} "
        f"unet.gradient_checkpointing={str(unet.gradient_checkpointing).lower()}"
    )


def _forecasts(config: Config, traced: TracedStep, checkpointing: bool) -> Iterator[Forecast]:
    """Yield the forecasts of all stages and micro batches."""
    other = with_options(config, checkpointing=checkpointing)
    if checkpointing != config.unet.gradient_checkpointing:
        traced = trace_step(other)
    each = config.train.global_batch_size // (config.plan.nodes * config.plan.gpus_per_node)
    for stage in _stages(config):
        for size in divisors(each):
            yield make_forecast(with_options(other, stage=stage, micro_batch=size), traced)


def comparison_lines(config: Config, traced: TracedStep) -> Iterator[str]:
    """Yield the lines of a table over ZeRO stages, activation checkpointing, micro batches."""
    yield _line(HEAD)
    for checkpointing in _checkpointing(config):
        other = with_options(config, checkpointing=checkpointing)
        if checkpointing != config.unet.gradient_checkpointing:
            traced = trace_step(other)
        for stage in _stages(config):
            for micro_batch in _micro_batches(with_options(other, stage=stage), traced):
                one = make_forecast(
                    with_options(other, stage=stage, micro_batch=micro_batch), traced
                )
                yield _row(one)


def _row(one: Forecast) -> str:
    return _line(
        (
            str(one.layout.stage),
            "on" if one.config.unet.gradient_checkpointing else "off",
            str(one.config.train.micro_batch_size),
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
    sizes = divisors(each)
    # gradient accumulation needs memory, too: a larger size may fit if a smaller one does not
    fits = [make_forecast(with_options(config, micro_batch=size), traced).fits for size in sizes]
    count = fits.index(False) if False in fits else len(sizes)
    return sizes[max(0, count - MICRO_BATCHES) : count + 1]
