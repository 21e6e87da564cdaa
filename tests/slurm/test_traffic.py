"""The bytes that 16 ranks on four nodes send in a step, against those that the plan expects."""

import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.project import Project
from tests.support.traffic import planned_bytes, sent_bytes
from tests.support.workshop import Workshop

RANKS = 16
OPTIONS = [
    "train.max_steps=3",
    "train.log_every=100",
    "train.global_batch_size=32",
    "train.micro_batch_size=1",
    "data.lanes=16",
]
PYTHON = """#!/usr/bin/env bash
export PYTHONPATH={root}
[[ -z ${{LF_TASK:-}} ]] || set -- -m tests.support.count_traffic {file} "$@"
exec {python} "$@"
"""


@pytest.mark.campaign
def test_sixteen_ranks_send_what_the_plan_says(
    project: Project, workshop: Workshop, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    words = PYTHON.format(file=tmp_path / "sent", python=sys.executable, root=ROOT)
    python.write_text(words)
    python.chmod(0o755)
    overrides = workshop.overrides("emoji", *OPTIONS, run=tmp_path / "run")
    settings = {"LF_PYTHON": str(python), "SBATCH_GPUS_PER_NODE": "4"}
    job = project.submit("--nodes=4", "slurm/train.sh", *overrides, **settings)
    project.ended(job)
    expected = planned_bytes(workshop.config("emoji", *OPTIONS), RANKS)
    found = [sent for (sent,) in sent_bytes(tmp_path / "sent", RANKS)]
    print({"expected": expected, "rank 0": found[0]})
    for sent in found:
        assert sum(sent.values()) == pytest.approx(expected, rel=0.02), sent
