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

from models.layers.attention import Backend, reference_attention, sdpa_attention
from models.layers.blocks import Attention, use_attention
from tests.support.plans import small
from trainer.cli import load_config
from trainer.config import Task
from trainer.plan.comparison import better_forecast, better_lines
from trainer.plan.costs import (
    CheckpointCost,
    StepTime,
    checkpoint_cost,
)
from trainer.plan.forecast import make_forecast, trace_step
from trainer.plan.job import plan, summary_lines
from trainer.plan.machine import machine_of
from trainer.plan.memory import Layout, Sizes, at_micro_batch, largest_micro_batch, predict
from trainer.plan.tracing import Stretch, Trace, fake_mode, fake_module, trace
from trainer.train.tasks import plan_step

EXPERIMENTS = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml"))


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
    checkpointing = {"off"} if config.task is Task.autoencoder else {"on", "off"}
    assert {(row[0], row[1]) for row in rows} == set(product("0123", checkpointing))
    # 8 samples of one GPU divide by 2, 4 and 8, and all of that fits in 80 GB
    assert {row[2] for row in rows} == {"2", "4", "8"}
    for stage, switch in product("0123", checkpointing):
        *peaks, last = [float(row[3]) for row in rows if row[:2] == [stage, switch]]
        assert peaks == sorted(peaks)
        # the largest is the whole batch: it needs no buffer for accumulated gradients
        buffer = round(4 * sum(map(torch.numel, trained)) / 2**30, 1)
        assert last >= peaks[-1] - buffer


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
    options += ["optim.lr=1", "optim.scale_lr=true"]
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
        "learning rate 8 = optim.lr=1 x 8 samples (optim.scale_lr)",
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


def test_samples_are_as_large_as_their_tensors_and_little_more() -> None:
    config = load_config(["+experiment=laion_512"])
    moments = 2 * 4 * 64 * 64 * 2
    plain = plan_step(config).sample_bytes
    assert moments < plain < 1.1 * moments
    stored = load_config(["+experiment=laion_512", "data.store_text=true"])
    text = 77 * 1024 * 2
    assert text < plan_step(stored).sample_bytes - plain < text + 1024


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
