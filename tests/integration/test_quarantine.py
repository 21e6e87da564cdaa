"""Bad samples met in training, on one rank and on two, and across a restart."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from data.shards.index import decode_index
from data.shards.manifest import Manifest
from tests.support.processes import run_command
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import latest_checkpoint
from trainer.train.loop import fit

DAMAGED = {0: [0, 5], 1: [1, 6], 2: [2, 7], 3: [0, 4]}
"""Rows of every shard, so that each of two ranks meets some within an epoch."""


@pytest.fixture(scope="module")
def damaged(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A copy of the latents with a byte flipped in some samples, and the keys of these."""
    folder = tmp_path_factory.mktemp("damaged") / "latents"
    shutil.copytree(workshop.folder / "latents_4", folder)
    shards = Manifest.load(folder, option="data.latents").shards
    keys = set()
    for number, rows in DAMAGED.items():
        shard = shards[number]
        index = decode_index((folder / shard.index_name).read_bytes())
        tar = bytearray((folder / shard.name).read_bytes())
        for row in rows:
            tar[int(index[row]["moments.npy"]["offset"]) + 200] ^= 1
            keys.add(index[row]["key"].decode())
        (folder / shard.name).write_bytes(tar)
    return folder, keys


def test_bad_samples_are_replaced_listed_and_counted_on_any_number_of_ranks(
    workshop: Workshop, damaged: tuple[Path, set[str]], tmp_path: Path
) -> None:
    latents, keys = damaged
    options = ["data.flip=false", f"data.latents={latents}", "data.max_rejected_share=0.3"]
    one, two = tmp_path / "one", tmp_path / "two"
    for steps in (2, 4):  # the second start goes on from the first one's checkpoint
        more = [*options, f"train.max_steps={steps}"]
        assert fit(workshop.config("emoji", *more, run=one)) == 0
        overrides = workshop.overrides("emoji", *more, run=two)
        ended = run_command("trainer", *overrides, ranks=2)
        assert ended.code == 0, ended.said
    ledgers = []
    for run in (one, two):
        ledger = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert all(item["shard"].endswith(".tar") for item in ledger)
        assert all("checksum of .moments.npy" in item["reason"] for item in ledger)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        counts = [line["data/rejected"] for line in lines if "data/rejected" in line]
        assert counts[-1] == len(ledger)
        checkpoint = latest_checkpoint(run / "checkpoints")
        assert checkpoint is not None
        assert [asdict(item) for item in checkpoint.training.quarantine] == ledger
        ledgers.append({item["key"] for item in ledger})
    assert ledgers[0] == ledgers[1]
    assert 4 <= len(ledgers[0]) <= len(keys)
    assert ledgers[0] <= keys
    assert max(abs(losses(one)[step] - losses(two)[step]) for step in range(1, 5)) < 1e-5


def test_too_many_bad_samples_stop_every_rank_with_one_line(
    workshop: Workshop, damaged: tuple[Path, set[str]], tmp_path: Path
) -> None:
    latents, _ = damaged
    options = ["data.flip=false", f"data.latents={latents}", "data.max_rejected_share=0.03"]
    overrides = workshop.overrides("emoji", *options, "train.max_steps=8", run=tmp_path)
    ended = run_command("trainer", *overrides, ranks=2)
    assert ended.code != 0
    assert re.search(
        r"data\.max_rejected_share: \d of 39 samples of data\.latents are bad", ended.said
    )
