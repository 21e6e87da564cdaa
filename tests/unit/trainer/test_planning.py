"""Plans against torch's own counters, the paper's sizes and sums done by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.attention import choose_attention
from models.config import AttentionBackend
from tests.conftest import NETWORKS, RUN
from trainer.cli import load_config
from trainer.config import Config
from trainer.costs import Work, find_gpu, ring_bytes, ring_s, sample_bytes, step_time
from trainer.forecast import make_plan, trace_step
from trainer.memory import Layout, Sizes, at_micro_batch, largest_micro_batch, predict
from trainer.planning import plan
from trainer.tasks.planned import build_module, frozen_networks, planned
from trainer.tracing import Stretch, Trace, fake_mode, fake_module, trace

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
def test_counts_the_trained_parameters(experiment: str, parameters: int):
    with torch.device("meta"):
        module = build_module(load_config([f"+experiment={experiment}"]))
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
def test_flops_are_those_that_torch_counts_on_the_real_model(experiment: str, option: str):
    config = small(experiment, option)
    traced = trace_step(config, device="cpu")
    choose_attention(AttentionBackend.sdpa, torch.device("cpu"), torch.float32, [])
    module = build_module(config)
    task = planned(config, module, traced.frozen)
    with FlopCounterMode(display=False) as counter:
        task.planned_loss(3).backward()
    per_image = traced.flops_per_image - traced.frozen.flops_per_image
    assert per_image == counter.get_total_flops() / 3


@pytest.mark.parametrize("experiment", ["emoji", "emoji_autoencoder"])
def test_other_micro_batches_follow_from_two(experiment: str):
    config = small(experiment, "unet.gradient_checkpointing=true")
    traced = trace_step(config, device="cpu")
    mode = fake_mode()
    module = fake_module(lambda: build_module(config), torch.float32, mode)
    task = planned(config, module, traced.frozen)
    with mode:
        direct = trace(module, lambda: task.planned_loss(7), 7)
    followed = at_micro_batch(*traced.traces, 7)
    assert followed.flops == direct.flops
    assert followed.peak_bytes == pytest.approx(direct.peak_bytes, rel=0.01)


def test_counts_storages_once_and_forgets_them_when_they_die():
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


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_prints_a_plan_of_every_experiment(experiment: str, capsys: pytest.CaptureFixture[str]):
    plan(small(experiment, "plan.compare=true", "plan.price_per_gpu_hour=2"))
    printed = capsys.readouterr().out
    for part in ("trained parameters", "activations", "GPU-hours", "cost", "checkpointing"):
        assert part in printed
    assert "nan" not in printed


def test_says_what_limits():
    config = small("emoji", "plan.gpus_per_node=2")
    traced = trace_step(config)
    slow = {
        "store": {"store_gib_per_s": 1e-9},
        "memory": {"reserve_gib": 79.2},
        "communication": {"network_gbit_per_s": 1e-9, "nodes": 2},
        "compute": {"mfu": 1e-9},
    }
    for limit, options in slow.items():
        changed = replace(config, plan=replace(config.plan, **options))
        assert make_plan(changed, traced).limit == limit


def test_days_and_cost_follow_from_the_step():
    config = small("emoji", "checkpoint.every=10", "train.max_steps=1000")
    found = make_plan(config, trace_step(config))
    seconds = 1000 * found.time.total_s + 100 * found.checkpoint.stall_s
    assert found.days * 86_400 == pytest.approx(seconds)
    assert found.gpu_hours == pytest.approx(seconds / 3600)
    assert found.checkpoint.size_bytes == 4 * found.traced.sizes.total * 4


def work_of(*, grad_accum_steps: int) -> Work:
    return Work(
        flops=1e12,
        parameters=10**9,
        weight_bytes=2,
        grad_accum_steps=grad_accum_steps,
        averages=1,
        read_bytes=0,
    )


def test_collectives_move_what_rings_do():
    config = small("emoji", "plan.nodes=4", "plan.gpus_per_node=1", "plan.network_gbit_per_s=80")
    gpu = find_gpu("a100_80gb")
    # four ranks all-reduce 10 GB over 10 GB/s: 2 x 3/4 x 10 GB
    assert ring_s(config.plan, gpu, 2 * 10e9) == pytest.approx(1.5)
    work = Work(
        flops=1e12, parameters=10**9, weight_bytes=2, grad_accum_steps=3, averages=1, read_bytes=0
    )
    assert [ring_bytes(stage, work) for stage in (1, 2, 3)] == [6e9, 14e9, 18e9]
    alone = replace(config.plan, nodes=1)
    assert ring_s(alone, gpu, 1e9) == 0


def test_offloading_moves_the_optimizer_to_the_host():
    config = small("emoji", "deepspeed.stage=2")
    traced = trace_step(config)
    kept = make_plan(config, traced)
    away = replace(config, deepspeed=replace(config.deepspeed, offload_optimizer=True))
    offloaded = make_plan(away, traced)
    moved = kept.memory.optimizer + kept.memory.ema
    assert offloaded.memory.peak == kept.memory.peak - moved
    # master weights, two moments, one average and the gradient
    assert offloaded.memory.host == 4 * traced.sizes.total * 5
    assert offloaded.time.optimizer_s > kept.time.optimizer_s


def test_samples_are_as_large_as_their_tensors_and_little_more():
    config = load_config(["+experiment=laion_512"])
    moments = 2 * 4 * 64 * 64 * 2
    assert moments < sample_bytes(config, 77) < 1.1 * moments
    stored = load_config(["+experiment=laion_512", "data.store_text=true"])
    text = 77 * 1024 * 2
    assert text < sample_bytes(stored, 77) - sample_bytes(config, 77) < text + 1024


def test_stage_3_hides_communication_behind_products():
    config = small("emoji", "deepspeed.stage=3", "plan.nodes=2")
    work = Work(
        flops=1e12, parameters=10**9, weight_bytes=2, grad_accum_steps=1, averages=1, read_bytes=0
    )
    time = step_time(config, find_gpu("a100_80gb"), work)
    longer = max(time.compute_s, time.communication_s)
    assert time.total_s == pytest.approx(longer + time.optimizer_s)


TRACES = (
    Trace(2, 10, (Stretch(2_000_000, 1_000_000, 600), Stretch(1_500_000, 0, 400))),
    Trace(4, 20, (Stretch(3_000_000, 2_000_000, 600), Stretch(2_500_000, 0, 400))),
)
SIZES = Sizes(total=1000, decayed=900)


@given(
    stage=st.integers(0, 3),
    ranks=st.integers(1, 64),
    accumulated=st.integers(1, 4),
    spare=st.integers(0, 10**8),
)
def test_the_largest_micro_batch_is_the_last_that_fits(
    stage: int, ranks: int, accumulated: int, spare: int
):
    layout = Layout(
        stage=stage,
        ranks=ranks,
        weight_bytes=4,
        grad_accum_steps=accumulated,
        averages=1,
        frozen_bytes=0,
        offload=False,
    )

    def peak(micro_batch: int) -> int:
        return predict(at_micro_batch(*TRACES, micro_batch), SIZES, layout).peak

    limit = peak(1) + spare
    largest = largest_micro_batch(*TRACES, SIZES, layout, limit)
    assert peak(largest) <= limit < peak(largest + 1)
    assert largest_micro_batch(*TRACES, SIZES, layout, peak(1) - 1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["plan.gpu=h100"], "plan.gpu=h100 is none of .*h100_80gb"),
        (["plan.gpus_per_node=3"], "train.global_batch_size=8 does not divide"),
        (
            ["plan.gpus_per_node=8"],
            "train.micro_batch_size=4 does not divide the 1 samples .* set it to 1",
        ),
        (["plan.mfu=0"], "plan.mfu=0.0 must be positive"),
    ],
)
def test_refuses_what_cannot_be_planned(options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        plan(small("emoji", *options))


def test_a_text_encoder_costs_its_tower_and_no_download():
    frozen = frozen_networks(load_config(["+experiment=laion_512"]))
    assert frozen.context_tokens == 77
    # KL-f8 has 83,653,863 parameters, ViT-H's text tower and its scale 354,032,641
    assert frozen.parameters == 83_653_863 + 354_032_641
