"""The plan's memory against what torch's own profiler sees a real DeepSpeed engine hold."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from models.layers.attention import padded_sdpa_attention
from models.layers.blocks import use_attention
from tests.support.workshop import RUN
from trainer.cli import load_config
from trainer.config import Config
from trainer.engine import buckets
from trainer.engine.engine import Engine
from trainer.plan.forecast import layout_of, memory_of, trace_step
from trainer.runtime.ranks import Ranks, join
from trainer.train.tasks import plan_step

SMALL = [*RUN, "conditioner=none", "unet.context_dim=0", "train.precision=fp32"]
CASES = {
    "diffusion, stage 0": (
        "emoji",
        [*SMALL, "deepspeed.stage=0", "train.global_batch_size=8", "train.micro_batch_size=8"],
    ),
    "diffusion, stage 1, checkpointing, accumulation": (
        "emoji",
        [
            *SMALL,
            "deepspeed.stage=1",
            "unet.gradient_checkpointing=true",
            "train.global_batch_size=24",
            "train.micro_batch_size=12",
        ],
    ),
    "first stage, stage 2": (
        "emoji_autoencoder",
        [*RUN, "deepspeed.stage=2", "train.global_batch_size=6", "train.micro_batch_size=6"],
    ),
}
OVERLAPPED = {
    "diffusion, stage 1, checkpointing, accumulation": 1_000_000,
    "first stage, stage 2": 100_000,
}
"""Elements of two buckets that take turns, by the name of a case."""


@pytest.mark.parametrize(
    ("case", "elements"), [*((case, 0) for case in CASES), *OVERLAPPED.items()]
)
def test_predicts_the_tensor_memory_of_a_real_step(
    case: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, options = CASES[case]
    if elements:  # one rank then reduces like several
        monkeypatch.setattr(buckets, "OVERLAPPED_RANKS", 1)
        monkeypatch.setattr(buckets, "OVERLAPPED_ELEMENTS", elements)
    config = load_config([f"+experiment={experiment}", *options])
    ranks = join()
    traced = trace_step(config, device="cpu")
    layout = layout_of(config, traced, ranks=ranks.world_size)
    memory = memory_of(config, traced, layout)
    predicted = memory.peak - memory.frozen
    assert predicted == pytest.approx(measure(config, ranks, tmp_path / "trace.json"), rel=0.1)


def measure(config: Config, ranks: Ranks, path: Path) -> int:
    """Peak bytes of tensors in the second optimizer step, by the allocator's events."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step_plan = plan_step(config)
        module = step_plan.build_module()
        use_attention(module, padded_sdpa_attention)
        engine = Engine(module, config, ranks)
        for step in range(2):
            with torch.profiler.record_function(f"step {step}"):
                for _ in range(micro_batches(config)):
                    loss = step_plan.loss(module, config.train.micro_batch_size)
                    engine.backward(loss)
                engine.step(step)
    profiler.export_chrome_trace(str(path))
    return peak_allocated(json.loads(path.read_text())["traceEvents"], "step 1")


def micro_batches(config: Config) -> int:
    return config.train.global_batch_size // config.train.micro_batch_size


def peak_allocated(events: Sequence[dict[str, Any]], within: str) -> int:
    """Bytes beyond those that were there at the first event: earlier engines leave theirs."""
    (span,) = [event for event in events if event.get("name") == within]
    start, end = span["ts"], span["ts"] + span["dur"]
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    _, total, made = memory[0]
    return max(total for at, total, _ in memory if start <= at <= end) - (total - made)
