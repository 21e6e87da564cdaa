"""Plans against torch's own counters, the paper's sizes and sums done by hand."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.first_stage.autoencoder import Autoencoder, build_autoencoder
from models.first_stage.memory import activation_bytes
from models.layers.attention import Backend, reference_attention, sdpa_attention
from models.layers.blocks import Attention, use_attention
from tests.support.workshop import NETWORKS, RUN
from trainer.cli import load_config
from trainer.config import Config
from trainer.plan.comparison import better_forecast, better_lines
from trainer.plan.costs import (
    CheckpointCost,
    StepTime,
    Work,
    checkpoint_cost,
    optimizer_s,
    ring_bytes,
    step_time,
)
from trainer.plan.forecast import make_forecast, trace_step
from trainer.plan.job import plan, summary_lines
from trainer.plan.machine import machine_of
from trainer.plan.memory import Layout, Sizes, at_micro_batch, largest_micro_batch, predict
from trainer.plan.tracing import LiveBytes, Stretch, Trace, fake_mode, fake_module, trace
from trainer.runtime.devices import find_gpu
from trainer.train.tasks import plan_step

EXPERIMENTS = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml"))
ONE_GPU = ["plan.gpus_per_node=1"]


def small(experiment: str, *more: str) -> Config:
    return load_config([f"+experiment={experiment}", *NETWORKS, *RUN, *ONE_GPU, *more])


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        ("laion_512", 865_910_724),
        ("imagenet_256", 400_920_579 + 1001 * 512),
        ("ffhq_256", 274_056_163),
        ("churches_256", 294_966_916),
    ],
)
def test_counts_the_trained_parameters(experiment: str, parameters: int) -> None:
    step = plan_step(load_config([f"+experiment={experiment}"]))
    with torch.device("meta"):
        module = step.build_module()
    assert Sizes.of(module).total == parameters


@pytest.mark.parametrize(
    ("experiment", "option"),
    [
        ("emoji", "unet.gradient_checkpointing=false"),
        ("emoji", "unet.gradient_checkpointing=true"),
        ("imagenet_256", "unet.gradient_checkpointing=false"),
        ("emoji_autoencoder", "autoencoder.mid_attention=true"),
    ],
)
def test_flops_are_those_that_torch_counts_on_the_real_model(experiment: str, option: str) -> None:
    # torch's counter does not know the CPU's kernels of attention
    config = small(experiment, option, "unet.attention_backend=reference")
    traced = trace_step(config, device="cpu")
    module = traced.step.build_module()
    use_attention(module, reference_attention)
    with FlopCounterMode(display=False) as counter:
        traced.step.loss(module, 3).backward()
    per_image = traced.flops_per_image - traced.frozen.flops_per_image
    assert per_image == counter.get_total_flops() / 3


class SmallNetwork(nn.Module):
    """A convolution, a linear layer and an attention over 4 x 4 tokens, with 2 heads of width 4."""

    def __init__(self, attention: Backend) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 24)
        self.attention = attention

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(image).flatten(2).transpose(1, 2)
        q, k, v = self.linear(tokens).unflatten(-1, (3, 2, 4)).unbind(2)
        return self.attention(q, k, v, None).sum()


@pytest.mark.parametrize(
    "attention",
    # the second does not keep the scores: its backward pass computes them again, uncounted
    [reference_attention, sdpa_attention],
)
def test_flops_of_a_small_network_are_those_counted_by_hand(attention: Backend) -> None:
    mode = fake_mode()
    module = fake_module(lambda: SmallNetwork(attention), torch.float32, mode)
    with mode:
        found = trace(module, lambda: module(torch.empty(5, 3, 4, 4)), 5)
    # 2 for a multiplication and an addition; 5 images of 16 pixels
    conv = 2 * (5 * 16) * (3 * 3 * 3) * 8
    linear = 2 * (5 * 16) * 8 * 24
    # scores and values; the backward pass differentiates each by both factors
    attending = 6 * (2 * (5 * 2) * 16 * 16 * 4)
    # the image needs no gradient: the backward pass of the convolution is that of its weight
    assert found.flops == 2 * conv + 3 * linear + attending


@pytest.mark.parametrize("experiment", ["emoji", "emoji_autoencoder"])
def test_other_micro_batches_follow_from_two(experiment: str) -> None:
    config = small(experiment, "unet.gradient_checkpointing=true")
    traced = trace_step(config, device="cpu")
    mode = fake_mode()
    module = fake_module(traced.step.build_module, torch.float32, mode)
    with mode:
        direct = trace(module, lambda: traced.step.loss(module, 7), 7)
    followed = at_micro_batch(*traced.traces, 7)
    assert followed.flops == direct.flops
    assert followed.peak_bytes == pytest.approx(direct.peak_bytes, rel=0.01)


def test_planning_leaves_other_networks_as_they_are() -> None:
    module = plan_step(small("emoji")).build_module()
    use_attention(module, reference_attention)
    trace_step(small("emoji", "unet.attention_backend=sdpa"), device="cpu")
    attentions = [layer for layer in module.modules() if isinstance(layer, Attention)]
    assert {layer.backend for layer in attentions} == {reference_attention}
    assert len(attentions) >= 6


def test_counts_storages_once_and_forgets_them_when_they_die() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = (x + 1.0).view(-1)  # a view has no bytes; the one before dies
            return (x * self.weight).sum()

    mode = fake_mode()
    module = fake_module(Sums, torch.float32, mode)
    with mode:
        found = trace(module, lambda: module(torch.ones(1000)), 1)
    # x while its successor is made; then, saved for the backward pass, x and its product
    assert 8000 <= found.peak_bytes <= 8000 + 3 * 4000
    assert found.stretches[-2].elements == 1


def table_of(printed: str) -> list[list[str]]:
    """The rows of plan.compare, without the head."""
    _, _, table = printed.rpartition("stage  checkpointing")
    return [line.split() for line in table.splitlines()[1:]]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_plan_and_a_comparison(
    experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(experiment, "plan.compare=true")
    plan(config)
    printed = capsys.readouterr().out
    trained = [p for p in plan_step(config).build_module().parameters() if p.requires_grad]
    (line,) = re.findall(r"trained parameters +(\S+)\n", printed)
    assert line == f"{sum(map(torch.numel, trained)):,}"
    assert "nan" not in printed
    rows = table_of(printed)
    checkpointing = {"off"} if experiment.startswith("emoji_autoencoder") else {"on", "off"}
    assert {(row[0], row[1]) for row in rows} == set(product("0123", checkpointing))
    # 8 samples of one GPU divide by 2, 4 and 8, and all of that fits in 80 GB
    assert {row[2] for row in rows} == {"2", "4", "8"}
    for stage, switch in product("0123", checkpointing):
        peaks = [float(row[3]) for row in rows if row[:2] == [stage, switch]]
        assert peaks == sorted(peaks)


def test_says_what_limits() -> None:
    config = small("emoji", "plan.gpus_per_node=2", "train.micro_batch_size=1")
    traced = trace_step(config)
    slow = {
        "store": {"store_gib_per_s": 1e-9},
        "memory": {"reserve_gib": 79.2},
        "communication": {"network_gbit_per_s": 1e-9, "nodes": 2},
        "compute": {"mfu": 1e-9},
    }
    for limit, options in slow.items():
        changed = replace(config, plan=replace(config.plan, **options))
        assert make_forecast(changed, traced).limit == limit


def test_days_and_cost_are_those_counted_by_hand() -> None:
    options = ["train.max_steps=43200", "checkpoint.every=4320", "checkpoint.keep=3"]
    config = small("emoji", *options, "plan.price_per_gpu_hour=2", "plan.gpus_per_node=2")
    second, minute = 1.0, 60.0
    time = StepTime(
        compute_s=0.75 * second,
        launch_s=0.25 * second,
        optimizer_s=0.25 * second,
        communication_s=second,
        hidden_s=0.25 * second,
        store_s=0.5 * second,
    )
    # 43,200 steps of 2 s are a day; so are 10 stalls of 144 minutes
    saved = CheckpointCost(size_bytes=2**30, stall_s=144 * minute, write_s=0)
    found = replace(make_forecast(config, trace_step(config)), time=time, checkpoint=saved)
    assert found.days == pytest.approx(2)
    assert found.gpu_hours == pytest.approx(2 * 24 * 2)
    assert found.images_per_s == pytest.approx(4)  # a batch of 8
    lines = {" ".join(line.split()) for line in summary_lines(found)}
    assert lines >= {
        "images/s 4, 2.0 a GPU",
        "time 2.0 days",
        "GPU-hours 96.0",
        "cost 192 at plan.price_per_gpu_hour=2",
        "together 2.000 s the store is read beside all else",
        "limit compute",
        "checkpoints on disk 3.00 GiB (checkpoint.keep=3)",
    }


def test_a_checkpoint_has_weights_moments_and_one_average() -> None:
    config = small("emoji", "plan.gpus_per_node=2")
    # fp32: 10^9 parameters x 4 bytes x (weights, 2 moments, 1 average)
    alone = replace(config, deepspeed=replace(config.deepspeed, stage=0))
    cost = checkpoint_cost(alone, machine_of(alone), parameters=10**9, averages=1)
    assert cost.size_bytes == 16 * 10**9
    # at stage 0 nothing is gathered: each of two ranks copies 8 GB at 6 GB/s
    assert cost.stall_s == pytest.approx(8 / 6)
    assert cost.write_s == pytest.approx(16e9 / (config.plan.store_gib_per_s * 2**30))


def work(stage: int, *, times: int = 1, overlaps: bool = False, weight_bytes: int = 2) -> Work:
    """The work of 10^9 parameters in `times` micro batches, without launches."""
    return Work(
        stage=stage,
        flops=1e15,
        operators=0,
        optimizer_operators=0,
        parameters=10**9,
        weight_bytes=weight_bytes,
        grad_accum_steps=times,
        averages=1,
        read_bytes=0,
        overlaps=overlaps,
    )


def test_collectives_move_what_rings_do() -> None:
    config = small("emoji", "plan.nodes=4", "plan.gpus_per_node=1", "plan.network_gbit_per_s=80")
    # four ranks all-reduce 10 GB over 10 GB/s, of which collectives reach 0.8: 2 x 3/4 x 10 GB
    assert machine_of(config).ring_s(2 * 10e9) == pytest.approx(1.5 / 0.8)
    assert [ring_bytes(stage, work(stage, times=3)) for stage in (1, 2, 3)] == [6e9, 14e9, 18e9]
    alone = replace(config, plan=replace(config.plan, nodes=1))
    assert machine_of(alone).ring_s(1e9) == 0


def test_the_optimizer_moves_ninety_bytes_for_a_parameter_as_deepspeed_does_it() -> None:
    machine = machine_of(small("emoji"))
    whole = optimizer_s(machine, work(1)) * machine.gpu.memory_gb_per_s
    assert whole == pytest.approx(90)  # GB, for 10^9 parameters
    # fp32 without DeepSpeed's partitions: AdamW reads 16 bytes and writes 12, the average 12
    plain = optimizer_s(machine, work(0, weight_bytes=4)) * machine.gpu.memory_gb_per_s
    assert plain == pytest.approx(40)


def test_launches_floor_the_time_of_small_micro_batches() -> None:
    config = small("emoji")
    machine = machine_of(config)
    many = replace(work(1, times=3), operators=1000)
    time = step_time(machine, many, store_gib_per_s=1)
    assert time.launch_s == pytest.approx(3 * 1000 * machine.launch_s)
    none = step_time(machine, work(1, times=3), store_gib_per_s=1)
    assert time.total_s - none.total_s == pytest.approx(time.launch_s)


def test_cards_and_software_have_their_own_rates() -> None:
    config = small("emoji", "plan.gpu=h100_80gb", "train.precision=bf16", "deepspeed.stage=1")
    eager = machine_of(config)
    compiled = machine_of(replace(config, train=replace(config.train, compile=True)))
    assert eager.mfu < compiled.mfu
    assert eager.launch_s > compiled.launch_s
    chosen = machine_of(replace(config, plan=replace(config.plan, mfu=0.5, gpus_per_node=8)))
    assert chosen.mfu == 0.5
    # a DGX H100 has eight ports of 400 Gbit/s
    assert chosen.network_gbit_per_s == 3200


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    config = small("emoji", "deepspeed.stage=2")
    traced = trace_step(config)
    kept = make_forecast(config, traced)
    away = replace(config, deepspeed=replace(config.deepspeed, offload_optimizer=True))
    offloaded = make_forecast(away, traced)
    moved = kept.memory.optimizer + kept.memory.ema
    assert offloaded.memory.peak == kept.memory.peak - moved
    # master weights, two moments, one average and the gradient
    assert offloaded.memory.host == 4 * traced.sizes.total * 5
    assert offloaded.time.optimizer_s > kept.time.optimizer_s


def test_samples_are_as_large_as_their_tensors_and_little_more() -> None:
    config = load_config(["+experiment=laion_512"])
    moments = 2 * 4 * 64 * 64 * 2
    plain = plan_step(config).sample_bytes
    assert moments < plain < 1.1 * moments
    stored = load_config(["+experiment=laion_512", "data.store_text=true"])
    text = 77 * 1024 * 2
    assert text < plan_step(stored).sample_bytes - plain < text + 1024


@pytest.mark.parametrize(
    ("stage", "reduced_gb", "passes"),
    # stages 0 and 1 reduce once, in the last backward pass; 2 in each; 3 beside all passes
    [(0, 4, 2 / 3 / 3), (1, 4, 2 / 3 / 3), (2, 12, 2 / 3), (3, 18, 1)],
)
@pytest.mark.parametrize("gbit_per_s", [8.0, 8e5])
def test_communication_hides_behind_the_passes_it_runs_beside(
    stage: int, reduced_gb: float, passes: float, gbit_per_s: float
) -> None:
    config = small("emoji", "plan.nodes=2", f"plan.network_gbit_per_s={gbit_per_s}")
    machine = machine_of(config)
    time = step_time(machine, work(stage, times=3, overlaps=True), store_gib_per_s=1)
    reduced_s = machine.ring_s(reduced_gb * 1e9)
    assert time.hidden_s == pytest.approx(min(reduced_s, passes * time.compute_s))
    shown = time.communication_s - time.hidden_s
    assert time.total_s == pytest.approx(time.compute_s + shown + time.optimizer_s)
    apart = step_time(machine, work(stage, times=3), store_gib_per_s=1)
    assert apart.hidden_s == 0


TRACES = (
    Trace(2, 10, 5, (Stretch(2_000_000, 1_000_000, 600), Stretch(1_500_000, 0, 400))),
    Trace(4, 20, 5, (Stretch(3_000_000, 2_000_000, 600), Stretch(2_500_000, 0, 400))),
)
SIZES = Sizes(tensors=2, total=1000, decayed=900)


@given(
    stage=st.integers(0, 3),
    ranks=st.integers(1, 64),
    samples=st.integers(1, 96),
    spare=st.integers(0, 10**8),
)
def test_the_largest_micro_batch_is_the_last_divisor_that_fits(
    stage: int, ranks: int, samples: int, spare: int
) -> None:
    layout = Layout(
        stage=stage,
        ranks=ranks,
        weight_bytes=4,
        grad_accum_steps=1,
        averages=1,
        frozen_bytes=0,
        offload=False,
    )

    def peak(micro_batch: int) -> int:
        one = replace(layout, grad_accum_steps=samples // micro_batch)
        return predict(at_micro_batch(*TRACES, micro_batch), SIZES, one).peak

    limit = peak(1) + spare
    largest = largest_micro_batch(*TRACES, SIZES, layout, limit, samples=samples)
    fitting = [n for n in range(1, samples + 1) if samples % n == 0 and peak(n) <= limit]
    assert largest == max(fitting)
    assert largest_micro_batch(*TRACES, SIZES, layout, 0, samples=samples) == 0


def test_points_to_a_row_that_is_over_a_tenth_faster() -> None:
    options = ["train.global_batch_size=64", "train.micro_batch_size=1"]
    slow = small("emoji", *options, "unet.gradient_checkpointing=true")
    configured = make_forecast(slow, trace_step(slow))
    best = better_forecast(configured)
    assert best is not None
    assert best.fits
    assert best.images_per_s > 1.1 * configured.images_per_s
    assert not best.config.unet.gradient_checkpointing
    printed = "\n".join(better_lines(configured, best))
    assert f"train.micro_batch_size={best.config.train.micro_batch_size} " in printed
    # the row that it points to has no better one
    assert better_forecast(make_forecast(best.config, best.traced)) is None


def test_points_to_a_row_that_fits_where_the_configured_one_does_not() -> None:
    config = small("emoji", "plan.reserve_gib=79.2", "unet.gradient_checkpointing=false")
    traced = trace_step(config)
    assert better_forecast(make_forecast(config, traced)) is None  # nothing fits
    needed = make_forecast(config, traced).memory.peak / 2**30
    tight = replace(config, plan=replace(config.plan, reserve_gib=79.2 - 0.999 * needed))
    configured = make_forecast(tight, traced)
    best = better_forecast(configured)
    assert best is not None
    assert best.fits
    assert not configured.fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["plan.gpu=h100"], "plan.gpu=h100 is none of .*h100_80gb"),
        (["plan.gpus_per_node=3"], "train.global_batch_size=8 does not divide"),
        (
            ["plan.gpus_per_node=8"],
            "does not divide into train.micro_batch_size=4 x 8 ranks: set train.micro_batch_size=1",
        ),
        (["plan.mfu=-1"], "plan.mfu=-1.0 must be a number ≥ 0 and ≤ 1"),
    ],
)
def test_refuses_what_cannot_be_planned(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(small("emoji", *options))


def test_a_text_encoder_costs_its_tower_and_no_download() -> None:
    frozen = plan_step(load_config(["+experiment=laion_512"])).frozen
    # KL-f8 has 83,653,863 parameters, ViT-H's text tower and its scale 354,032,641
    assert frozen.parameters == 83_653_863 + 354_032_641


@pytest.mark.parametrize(
    ("option", "width"),
    [("train.precision=bf16", 2), ("train.precision=fp32", 4), ("data.store_text=true", 0)],
)
def test_a_text_encoder_takes_memory_in_its_precision_if_it_runs(option: str, width: int) -> None:
    frozen = plan_step(load_config(["+experiment=laion_512", option])).frozen
    assert frozen.bytes == 354_032_641 * width
    assert bool(frozen.flops_per_image) == bool(width)


EVALUATED = ["eval.every=10", "eval.num_samples=16", "eval.batch_size=8", "sampler.steps=5"]


def test_an_evaluation_costs_what_is_counted_by_hand() -> None:
    config = small("emoji", *EVALUATED, "sampler.guidance_scale=3", "train.max_steps=100")
    traced = trace_step(config, device="cpu")
    forecast = make_forecast(config, traced)
    evaluation, found = forecast.evaluation, traced.evaluation
    assert evaluation is not None
    assert found is not None
    module = traced.step.build_module()
    use_attention(module, reference_attention)  # torch counts no kernel of a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        traced.step.loss(module, 3)
    assert found.forward_flops == counter.get_total_flops() / 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_autoencoder(config.autoencoder).decode(torch.empty(1, 4, 8, 8))
    assert found.decoding_flops == counter.get_total_flops()
    # 16 images, 5 steps, with and without the condition; this peak is that of fp32
    work = 16 * (5 * 2 * found.forward_flops + found.decoding_flops)
    rate = forecast.gpu.fp32_tflops * 1e12 * config.plan.mfu
    assert evaluation.seconds == pytest.approx(work / rate)
    memory, weights = forecast.memory, 4 * traced.sizes.total
    state = memory.weights + memory.optimizer + memory.ema + weights + found.frozen_bytes
    decoding = 8 * 3 * 16 * 16**2 * 4  # the lowest level's channels at half the resolution
    assert evaluation.phase == "drawing"
    assert evaluation.peak_bytes == pytest.approx(state + 8 * 2 * found.forward_bytes, rel=1e-6)
    assert 8 * 2 * found.forward_bytes > decoding
    without = replace(forecast, evaluation=None)
    assert (forecast.days - without.days) * 86_400 == pytest.approx(11 * evaluation.seconds)


def test_an_evaluation_that_does_not_fit_is_said() -> None:
    config = small("emoji", *EVALUATED)
    forecast = make_forecast(config, trace_step(config, device="cpu"))
    assert forecast.evaluation is not None
    assert forecast.fits
    short = replace(forecast, limit_bytes=forecast.memory.peak)
    assert not replace(short, evaluation=replace(forecast.evaluation, peak_bytes=10**15)).fits
    assert replace(short, evaluation=None).fits
    (line,) = (line for line in summary_lines(forecast) if "an evaluation" in line)
    assert "GiB at its peak, drawing" in line


@pytest.mark.parametrize("experiment", ["laion_512", "churches_256", "emoji"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_first_stage_is_that_of_a_trace(experiment: str, dtype: torch.dtype) -> None:
    config = load_config([f"+experiment={experiment}"])
    stage, pixels = config.autoencoder, config.data.image_size
    side, mode = pixels // stage.downsample_factor, fake_mode()
    module = fake_module(lambda: build_autoencoder(stage), dtype, mode).eval()
    assert isinstance(module, Autoencoder)
    bound = activation_bytes(stage, pixels, dtype.itemsize)
    with mode, torch.no_grad(), LiveBytes(module) as decoding:
        module.decode(torch.empty(2, stage.latent_channels, side, side, dtype=dtype))
    assert 0.6 * bound < decoding.stretch(0).peak_bytes / 2 < 1.01 * bound
    with mode, torch.no_grad(), LiveBytes(module) as encoding:
        module.encode(torch.empty(2, 3, pixels, pixels, dtype=dtype))
    assert encoding.stretch(0).peak_bytes / 2 < 1.01 * bound
