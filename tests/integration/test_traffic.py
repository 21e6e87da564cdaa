"""The bytes that ranks send in a step, against those that the plan expects."""

import json
from pathlib import Path

import pytest

from tests.support.processes import run_command
from tests.support.traffic import planned_bytes, sent_bytes
from tests.support.workshop import Workshop

RANKS = 2
OPTIONS = ["train.max_steps=3", "train.log_every=100", "data.lanes=8", "train.micro_batch_size=2"]


def test_ranks_send_what_the_plan_says(workshop: Workshop, tmp_path: Path) -> None:
    options = [[*OPTIONS, f"deepspeed.stage={stage}"] for stage in range(4)]
    runs = [
        workshop.overrides("emoji", *of_run, run=tmp_path / str(stage))
        for stage, of_run in enumerate(options)
    ]
    (tmp_path / "runs").write_text(json.dumps(runs))
    words = [tmp_path / "sent", "-m", "tests.support.walk", tmp_path / "runs"]
    ended = run_command("tests.support.count_traffic", *words, ranks=RANKS)
    assert ended.code == 0, ended.said
    for of_rank in sent_bytes(tmp_path / "sent", RANKS):
        for sent, of_run in zip(of_rank, options, strict=True):
            expected = planned_bytes(workshop.config("emoji", *of_run), RANKS)
            if of_run is options[3]:
                # DeepSpeed keeps weights below 100,000 elements whole: one gather, not 2 x 2
                expected *= (2 * 1 + 1) / (2 * 3)
            assert sum(sent.values()) == pytest.approx(expected, rel=0.02), sent
