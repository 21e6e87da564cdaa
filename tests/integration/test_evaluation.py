"""Evaluations beside a training, within it, after it, and on any number of ranks."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.processes import Command, run_command
from tests.support.workshop import Workshop, losses
from trainer.callbacks.jsonl import JsonLines
from trainer.checkpoints.reader import latest_checkpoint
from trainer.evaluate.job import evaluate
from trainer.pictures.grids import GAP
from trainer.reference.job import make_references
from trainer.runs.paths import SAMPLES
from trainer.runtime import slices
from trainer.train.denoiser import DenoisingTask
from trainer.train.loop import fit

MEASURE = [
    "eval.features=[efficientnet_lite0,open_clip]",
    "eval.metrics=[frechet,kid,precision_recall,cmmd]",
    "eval.clip_score=true",
    "eval.kid_subset_size=8",
    "eval.num_samples=11",
    "eval.batch_size=3",
]
TRAIN = ["train.max_steps=4", "checkpoint.every=2", "data.flip=false"]
KEYS = {
    "fd_efficientnet_lite0",
    "fd_open_clip",
    "kid_efficientnet_lite0",
    "kid_efficientnet_lite0_std",
    "kid_open_clip",
    "kid_open_clip_std",
    "precision_efficientnet_lite0",
    "recall_efficientnet_lite0",
    "precision_open_clip",
    "recall_open_clip",
    "cmmd",
    "clip_score",
    "clip_score_stderr",
    "clip_score_shuffled",
}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in KEYS}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quiet(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that is never evaluated."""
    run = tmp_path_factory.mktemp("quiet")
    assert fit(workshop.config("emoji", *TRAIN, run=run)) == 0
    return run


def test_a_training_without_evaluations_needs_nothing_for_them(
    workshop: Workshop, quiet: Path, tmp_path: Path
) -> None:
    assert not (quiet / "samples").exists()
    assert not any("eval/" in key for line in lines(quiet) for key in line)
    options = ["train.max_steps=1", "eval.features=[inception]", "eval.inception_weights=/lost"]
    assert fit(workshop.config("emoji", *options, run=tmp_path / "denoiser")) == 0
    options += [f"data.val={tmp_path}"]
    assert fit(workshop.config("emoji_autoencoder", *options, run=tmp_path / "stage")) == 0


def test_a_run_that_goes_on_without_evaluations_makes_none(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped in an evaluation, so its checkpoint says that one is due."""
    monkeypatch.setattr(DenoisingTask, "evaluate", lambda *_, **__: None)
    assert fit(workshop.config("emoji", *TRAIN, "eval.every=2", run=tmp_path)) == 85
    assert fit(workshop.config("emoji", *TRAIN, "eval.every=0", run=tmp_path)) == 0


def test_evaluations_leave_the_training_as_it_is_bit_for_bit(
    workshop: Workshop, quiet: Path, tmp_path: Path
) -> None:
    options = [*TRAIN, *MEASURE, "eval.every=1", "ema.decays=[0.999,0.05]"]
    assert fit(workshop.config("emoji", *options, run=tmp_path)) == 0
    assert losses(tmp_path) == losses(quiet)
    ended = [latest_checkpoint(run / "checkpoints") for run in (quiet, tmp_path)]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer"):
        one, other = (end.tensors(kind)[kind] for end in ended if end is not None)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    evaluated = {line["step"]: line for line in lines(tmp_path) if "eval/cmmd" in line}
    assert sorted(evaluated) == [0, 1, 2, 3, 4]
    last = evaluated[4]
    for prefix in ("eval/", "eval/decay_0.05/"):
        assert {k.removeprefix(prefix) for k in last if k.removeprefix(prefix) in KEYS} == KEYS
    assert last["eval/fd_open_clip"] != last["eval/decay_0.05/fd_open_clip"]
    assert evaluated[0]["eval/fd_open_clip"] == evaluated[0]["eval/decay_0.05/fd_open_clip"]
    protocol = read(tmp_path / "protocols" / f"{last['eval/protocol']}.json")
    assert protocol["samples"]["num_samples"] == 11
    assert set(protocol["features"]) == {"efficientnet_lite0", "open_clip"}


def test_a_training_logs_the_same_protocol_with_a_folder_to_measure_later(
    workshop: Workshop, tmp_path: Path
) -> None:
    options = ["train.max_steps=1", "eval.every=1"]
    folder = f"eval.images={workshop.folder / 'pictures'}"
    runs = {tmp_path / "with": [folder], tmp_path / "without": []}
    for run, more in runs.items():
        assert fit(workshop.config("emoji", *options, *more, run=run)) == 0
    (expected,), (found,) = (
        {line["eval/protocol"] for line in lines(run) if "eval/protocol" in line} for run in runs
    )
    assert found == expected
    assert read(tmp_path / "with" / "protocols" / f"{found}.json")["samples"]["num_samples"] == 4


def test_any_number_of_ranks_gives_the_same_samples_and_numbers(
    workshop: Workshop, quiet: Path, tmp_path: Path
) -> None:
    found, samples, references = [], [], []
    for ranks in (1, 2, 3, 4):
        run = tmp_path / str(ranks)
        options = [
            *MEASURE,
            f"checkpoint.load={quiet / 'checkpoints' / 'step_00000004'}",
            f"eval.references={run / 'references'}",
            "eval.keep_samples=true",
        ]
        overrides = workshop.overrides("emoji", *options, run=run)
        done = run_command("trainer.evaluate", *overrides, ranks=ranks)
        assert done.code == 0, done.said
        (file,) = (run / "evaluations").glob("other_step_00000004_*.json")
        found.append(read(file))
        kept = sorted(file.with_suffix("").glob("*.png"))
        samples.append([path.read_bytes() for path in kept])
        made = (run / "references").iterdir()
        references.append({path.name: path.read_bytes() for path in made})
    assert [len(images) for images in samples] == [11] * 4
    assert samples[1:] == samples[:1] * 3
    assert len(references[0]) == 4
    assert references[1:] == references[:1] * 3
    assert set(numbers(found[0])) == KEYS
    for other in found[1:]:
        assert numbers(other) == pytest.approx(numbers(found[0]), abs=1e-6, rel=1e-6)
        assert other["protocol"] == found[0]["protocol"]


def test_an_evaluation_outlives_the_training_that_goes_on_from_before_it(
    workshop: Workshop, tmp_path: Path
) -> None:
    offline = [*TRAIN, *MEASURE, "logger.wandb.mode=offline"]
    assert fit(workshop.config("emoji", *TRAIN, "train.max_steps=2", run=tmp_path)) == 0
    early = workshop.config("emoji", *offline, run=tmp_path)
    evaluate(early)
    (file,) = (tmp_path / "evaluations").glob("step_00000002_*.json")
    (line,) = [line for line in lines(tmp_path) if "eval/cmmd" in line]
    assert line["step"] == 2
    assert {f"eval/{k}": v for k, v in numbers(read(file)).items()}.items() <= line.items()
    assert not list(tmp_path.glob("wandb")), "the training has steps left, and sends it itself"

    # resumed at step 1: the lines of step 2 are cut, but for the evaluation's
    JsonLines(tmp_path / "metrics.jsonl", 1).close()
    assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == [1]
    assert [line for line in lines(tmp_path) if "eval/cmmd" in line] == [line]
    JsonLines(tmp_path / "metrics.jsonl", 2).close()
    assert lines(tmp_path).count(line) == 1

    assert fit(early) == 0
    assert lines(tmp_path).count(line) == 1
    assert file.with_suffix(".sent").exists()
    evaluate(workshop.config("emoji", *offline, "eval.seed=1", run=tmp_path))
    records = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2
    ended = latest_checkpoint(tmp_path / "checkpoints")
    assert ended is not None
    sent = [values for record in records for values in history(record)]
    assert all(record.stem == f"run-{ended.training.wandb_id}" for record in records)
    measured = [
        (line["step"], line["eval/cmmd"]) for line in lines(tmp_path) if "eval/cmmd" in line
    ]
    assert [step for step, _ in measured] == [2, 4]
    assert [(v["step"], v["eval/cmmd"]) for v in sent if "eval/cmmd" in v] == measured


def history(record: Path) -> list[dict[str, Any]]:
    """What was logged, in W&B's own file."""
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", record]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    entries = [json.loads(line) for line in shown.splitlines()]
    return [entry["history"]["item"] for entry in entries if entry["type"] == "history"]


def test_a_folder_of_images_is_measured_against_a_reference_made_beforehand(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "eval.features=[efficientnet_lite0]",
        "eval.metrics=[frechet,precision_recall]",
        f"eval.references={tmp_path / 'references'}",
        "eval.batch_size=7",
    ]
    make_references(workshop.config("emoji", *options, "eval.reference_samples=20", run=tmp_path))
    assert "efficientnet_lite0: 20 images" in capsys.readouterr().out
    (manifest,) = (tmp_path / "references").glob("*.json")
    about = read(manifest)
    assert (about["images"], about["rows"], about["image_size"]) == (20, 20, 32)
    made = manifest.with_suffix(".safetensors").stat().st_mtime_ns

    # the pictures that the data set was packed from, validation images included
    images = [*options, f"eval.images={workshop.folder / 'pictures'}"]
    evaluate(workshop.config("emoji", *images, "eval.reference_samples=20", run=tmp_path))
    assert manifest.with_suffix(".safetensors").stat().st_mtime_ns == made
    evaluate(workshop.config("emoji", *images, run=tmp_path))
    results = [read(path) for path in (tmp_path / "evaluations").glob("images_pictures_*.json")]
    few, whole = sorted(results, key=lambda values: -values["fd_efficientnet_lite0"])
    assert few["protocol"] != whole["protocol"]
    assert whole["num_samples"] == 48
    sizes = sorted(read(path)["images"] for path in (tmp_path / "references").glob("*.json"))
    assert len(sizes) == 2
    for found, size in zip((few, whole), sizes, strict=True):
        # every image of the reference is measured, too, and lies at distance 0 from itself
        assert found["recall_efficientnet_lite0"] == 1
        assert found["precision_efficientnet_lite0"] >= size / 48
    assert whole["fd_efficientnet_lite0"] < 0.5 * few["fd_efficientnet_lite0"]


def test_slices_of_reconstructions_change_no_number(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.max_steps=1", "eval.every=1", "eval.features=[efficientnet_lite0]"]
    found: list[dict[str, float]] = []
    pictures: list[bytes] = []
    for most_bytes in (slices.MOST_BYTES, 1):
        monkeypatch.setattr(slices, "MOST_BYTES", most_bytes)
        run = tmp_path / str(most_bytes)
        assert fit(workshop.config("emoji_autoencoder", *options, run=run)) == 0
        last = next(line for line in reversed(lines(run)) if "eval/psnr_db" in line)
        found.append({name: value for name, value in last.items() if name.startswith("eval/")})
        pictures.append((run / SAMPLES / "step_00000001.png").read_bytes())
    whole, sliced = found
    assert sliced == pytest.approx(whole, rel=1e-5)
    assert pictures[0] == pictures[1]
    assert len(whole) > 2


def test_a_second_evaluation_at_the_same_moment_ends_at_once_and_names_the_owner(
    workshop: Workshop, quiet: Path, tmp_path: Path
) -> None:
    load = f"checkpoint.load={quiet / 'checkpoints' / 'step_00000004'}"
    options = ["eval.features=[efficientnet_lite0]", load, f"eval.references={tmp_path}"]
    words = workshop.overrides("emoji", *options, "eval.keep_samples=true", run=tmp_path / "run")
    words += ["eval.prompts=[a red circle,a blue square]"]
    folder = tmp_path / "run" / "evaluations"
    first = Command("trainer.evaluate", words)
    while not list(folder.glob(".*.lease")):
        assert first.poll() is None, first.printed()
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = run_command("trainer.evaluate", *words)
    first.send_signal(signal.SIGCONT)
    assert second.code == 1
    (line,) = (line for line in second.said.splitlines() if "is in use by" in line)
    assert f"(process {first.pid}" in line
    assert "or evaluate another checkpoint, or with other options" in line
    ended = first.finish()
    assert ended.code == 0, ended.said
    (file,) = folder.glob("*.json")
    assert "fd_efficientnet_lite0" in read(file)
    assert len([*file.with_suffix("").glob("*.png")]) == 4
    with Image.open(file.with_suffix(".png")) as sheet:
        assert sheet.size == (2 * (32 + GAP) + GAP, 32 + 2 * GAP), "no room is left blank"
    assert not [*folder.glob(".*")]
