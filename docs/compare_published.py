"""Hold the plan against published throughputs: `python -m docs.compare_published`.

Writes the tables of docs/planning.md from docs/published.yaml. One number is fitted for each card
and class of software: `mfu` of conf/gpus.yaml. A row is predicted with the fit to the other rows of
its card and class. `launch_us` is one number for a class of software, fitted to all its rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trainer.cli import load_config
from trainer.config import Config
from trainer.plan.costs import Work, optimizer_s, step_time, updated_bytes
from trainer.plan.forecast import trace_one
from trainer.plan.machine import Machine
from trainer.plan.memory import Sizes
from trainer.plan.preparation import trace_encoding
from trainer.plan.tracing import Trace
from trainer.runtime.devices import find_gpu, launch_s
from trainer.train.tasks import plan_step

FOLDER = Path(__file__).parent
PAGE = FOLDER / "planning.md"
BEGIN = "<!-- begin: python -m docs.compare_published -->\n"
END = "<!-- end -->\n"
SCALED = (
    ("MosaicML, stored latents", "a100_80gb", 512),
    ("MosaicML, stored latents", "a100_80gb", 256),
    ("MosaicML, encoders in the step", "a100_40gb", 512),
    ("AWS, several nodes", "h100_80gb", 512),
    ("MLPerf 4.0", "h100_80gb", 512),
    ("NeMo", "a100_80gb", 512),
    ("NeMo", "h100_80gb", 512),
)
"""(group, card, px) of the rows that show how throughput grows with the number of GPUs."""


@dataclass(frozen=True, slots=True)
class Network:
    """The traced U-Net at one resolution, and the encoders beside it."""

    sizes: Sizes
    trace: Trace
    first_stage_flops: float
    """[FLOPs] of the first stage's encoder for one image."""
    text_flops: float
    """[FLOPs] of the text encoder for one caption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published throughput; columns as in docs/published.yaml."""

    group: str
    software: Mapping[str, Any]
    card: str
    px: int
    gpus: int
    gpus_of_a_node: int
    micro_batch: int
    global_batch: int
    images_per_s: float
    entry: str = ""
    network_gbit_per_s: float = 0.0
    """Of a node; 0: that of NVIDIA's systems with this card."""

    @property
    def key(self) -> tuple[str, str]:
        """The peak's name in conf/gpus.yaml and class of software: one constant is fitted for each.

        Cards of one kind with other memory share it.
        """
        return self.card.partition("_")[0], self.software["class"]


def read_rows(part: str) -> list[Row]:
    """Read the rows of `groups` or `scaling_only`."""
    page = yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8"))
    return [
        Row(
            group=group["name"],
            software=page["software"][group["software"]],
            **dict(zip(page["columns"], cells, strict=False)),
        )
        for group in page[part]
        for cells in group["rows"]
    ]


def trace_networks() -> dict[int, Network]:
    """Trace Stable Diffusion 2's U-Net and the encoders at 256 and 512 px."""
    return {px: _network(px) for px in (256, 512)}


def _network(px: int) -> Network:
    config = load_config(["+experiment=laion_512", f"data.image_size={px}"])
    config = replace(config, unet=replace(config.unet, gradient_checkpointing=False))
    step = plan_step(config)
    trace, sizes = trace_one(config, step)
    return Network(sizes, trace, _encoder_flops(config), step.frozen.flops_per_image)


def _encoder_flops(config: Config) -> float:
    one = replace(config, precompute=replace(config.precompute, batch_size=1))
    return trace_encoding(one).flops_per_image


def machine_of(row: Row, mfu: float) -> Machine:
    """Return the machine of a row."""
    gpu = find_gpu(row.card)
    network = row.network_gbit_per_s or gpu.nic_gbit_per_s * row.gpus_of_a_node
    return Machine(
        gpu=gpu,
        nodes=row.gpus // row.gpus_of_a_node,
        gpus_per_node=row.gpus_of_a_node,
        network_gbit_per_s=network,
        peak_tflops=gpu.bf16_tflops,
        mfu=mfu,
        launch_s=launch_s(row.software["class"]),
    )


def work_of(row: Row, networks: Mapping[int, Network]) -> Work:
    """Return the work of one GPU in an optimizer step of a row."""
    network, software = networks[row.px], row.software
    each = row.global_batch // row.gpus
    flops = network.trace.flops / network.trace.micro_batch
    flops += network.first_stage_flops * software["first_stage"]
    flops += network.text_flops * software["text"]
    return Work(
        stage=software["stage"],
        flops=flops * each,
        operators=network.trace.operators + software["more_operators"],
        optimizer_operators=software["optimizer_operators"],
        unfused_bytes=software["unfused_bytes"],
        parameters=network.sizes.total,
        weight_bytes=software["reduced_bytes"],
        grad_accum_steps=each // row.micro_batch,
        averages=software["averages"],
        read_bytes=0,
        overlaps=True,
    )


def predict(row: Row, networks: Mapping[int, Network], mfu: float) -> float:
    """Predict images/s of a row, with trainer.plan's own functions."""
    time = step_time(machine_of(row, mfu), work_of(row, networks), store_gib_per_s=1)
    return row.global_batch / time.total_s


def own_mfu(row: Row, networks: Mapping[int, Network]) -> float:
    """Return the mfu with which the plan says a row's own throughput; at most 1."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        slow = predict(row, networks, middle) < row.images_per_s
        low, high = (middle, high) if slow else (low, middle)
    return high


def fit(rows: Sequence[Row], networks: Mapping[int, Network]) -> dict[tuple[str, str], float]:
    """Fit mfu for each card and class of software: the median over its rows."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(own_mfu(row, networks))
    return {key: median(values) for key, values in found.items()}


def fit_launches(rows: Sequence[Row], networks: Mapping[int, Network]) -> dict[str, float]:
    """Fit the microseconds of an operator: least squares of a card's rows, median over cards.

    Cards with fewer than three micro batches do not count: one line fits nearly anything there.
    """
    cards: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cards.setdefault(row.key, []).append(row)
    found: dict[str, list[float]] = {}
    for (_, software), chosen in cards.items():
        if len({row.micro_batch for row in chosen}) >= 3:
            found.setdefault(software, []).append(_operator_us(chosen, networks))
    return {software: median(values) for software, values in found.items()}


def _operator_us(rows: Sequence[Row], networks: Mapping[int, Network]) -> float:
    """Solve 1 = products / mfu + operators * time, both as shares of a row's micro batch."""
    products: list[float] = []
    operators: list[float] = []
    for row in rows:
        machine, work = machine_of(row, mfu=1.0), work_of(row, networks)
        updated = machine.ring_s(updated_bytes(work.stage, work))
        beside = optimizer_s(machine, work) + updated
        passes = row.global_batch / row.images_per_s - beside
        products.append(machine.products_s(work.flops) / passes)
        operators.append(work.operators * work.grad_accum_steps / 1e6 / passes)
    a, b, d = _dot(products, products), _dot(products, operators), _dot(operators, operators)
    return (a * sum(operators) - b * sum(products)) / (a * d - b * b)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def ratios(rows: Sequence[Row], networks: Mapping[int, Network]) -> list[float | None]:
    """Return predicted / published of each row, without the row itself in the fit.

    None for a row that is the only one of its card and class.
    """
    own = [own_mfu(row, networks) for row in rows]
    result: list[float | None] = []
    for place, row in enumerate(rows):
        others = [
            mfu
            for other, (one, mfu) in enumerate(zip(rows, own, strict=True))
            if other != place and one.key == row.key
        ]
        speed = predict(row, networks, median(others)) if others else None
        result.append(speed / row.images_per_s if speed else None)
    return result


def scaling(
    rows: Sequence[Row], networks: Mapping[int, Network], mfu: float
) -> Iterator[tuple[Row, float, float]]:
    """Yield (row, predicted, published) of throughput per GPU, relative to the first row."""
    first = rows[0]
    base = predict(first, networks, mfu) / first.gpus
    for row in rows:
        predicted = predict(row, networks, mfu) / row.gpus / base
        yield row, predicted, row.images_per_s / row.gpus / (first.images_per_s / first.gpus)


def section(networks: Mapping[int, Network]) -> str:
    """Return the tables of docs/planning.md."""
    rows = read_rows("groups")
    held = ratios(rows, networks)
    return "\n".join(
        [
            *summary_lines(rows, held),
            "",
            *row_lines(rows, held),
            "",
            *scaling_lines(rows, networks),
            "",
        ]
    )


def summary_lines(rows: Sequence[Row], held: Sequence[float | None]) -> Iterator[str]:
    """Yield the errors of all rows, and of each card and class."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row, ratio in zip(rows, held, strict=True):
        if ratio is not None:
            groups.setdefault(row.key, []).append(abs(ratio - 1))
    every = [error for errors in groups.values() for error in errors]
    yield "| card, software | rows | median error | worst |"
    yield "|---|---|---|---|"
    for (card, software), errors in groups.items():
        yield _errors(f"{card}, {software}", errors)
    yield _errors("all", every)


def _errors(name: str, errors: Sequence[float]) -> str:
    return f"| {name} | {len(errors)} | {median(errors):.1%} | {max(errors):.1%} |"


def row_lines(rows: Sequence[Row], held: Sequence[float | None]) -> Iterator[str]:
    """Yield the table of all rows."""
    yield "| published by | card | px | GPUs | micro batch | images/s | predicted | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for row, ratio in zip(rows, held, strict=True):
        said = f"{ratio * row.images_per_s:,.0f} | {ratio:.2f}" if ratio else "fitted to it | "
        numbers = f"{row.px} | {row.gpus} | {row.micro_batch} | {row.images_per_s:,.0f}"
        yield f"| {row.group} | {row.card} | {numbers} | {said} |"


def scaling_lines(rows: Sequence[Row], networks: Mapping[int, Network]) -> Iterator[str]:
    """Yield the table of throughputs per GPU relative to the fewest GPUs."""
    constants = fit(rows, networks)
    everything = [*rows, *read_rows("scaling_only")]
    yield "| published by | card, px | GPUs: predicted / published, of the first |"
    yield "|---|---|---|"
    for group, card, px in SCALED:
        chosen = [one for one in everything if (one.group, one.card, one.px) == (group, card, px)]
        chosen.sort(key=lambda one: one.gpus)
        mfu = constants[chosen[0].key]
        cells = [
            f"{row.gpus}: {predicted:.0%} / {published:.0%}"
            for row, predicted, published in scaling(chosen, networks, mfu)
        ]
        yield f"| {group} | {card}, {px} | {', '.join(cells)} |"


def main() -> None:
    """Write the tables, and print the fitted constants."""
    networks = trace_networks()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + section(networks) + END + after, encoding="utf-8")
    rows = read_rows("groups")
    for (card, software), mfu in fit(rows, networks).items():
        print(f"{card} {software}: mfu {mfu:.2f}")
    for software, time_us in fit_launches(rows, networks).items():
        print(f"{software}: launch_us {time_us:.0f}")


if __name__ == "__main__":
    main()
