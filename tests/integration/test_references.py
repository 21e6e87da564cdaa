"""References made by real processes, stopped and resumed on another number of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.workshop import Workshop, losses
from trainer.train.loop import fit
from trainer.train.watchdog import Watchdog

MAKE = ["eval.features=[efficientnet_lite0]", "eval.batch_size=4"]
ROUNDS = 10
TRAIN = ["train.max_steps=2", "checkpoint.every=2", "eval.every=2", "data.flip=false"]


def run(module: str, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.run(
        [*launcher, module, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob("efficientnet_lite0-*.unfinished/*"))


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The references that one process makes in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    options = workshop.overrides("emoji", *MAKE, f"eval.references={folder}")
    done = run("trainer.reference", *options)
    assert done.returncode == 0, done.stdout
    assert f"efficientnet_lite0: 39 images, in {folder}" in done.stdout
    return content(folder)


def test_a_job_that_is_stopped_goes_on_with_other_ranks_and_gives_the_same_bits(
    workshop: Workshop, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    options = workshop.overrides("emoji", *MAKE, f"eval.references={tmp_path}")
    stop = ["2", "SIGTERM", "trainer.reference"]
    stopped = run("tests.support.stop_at", *stop, *options, ranks=3)
    assert stopped.returncode != 0
    assert "asked to stop: finished parts of references are saved" in stopped.stdout
    names = sorted(path.name for path in unfinished(tmp_path))
    assert names == ["moments.safetensors", "rows_0_12.safetensors"], "one round of three ranks"
    done = run("trainer.reference", *options, ranks=2)
    assert done.returncode == 0, done.stdout
    assert content(tmp_path) == whole


def test_a_training_is_stopped_while_it_makes_references_and_goes_on(
    workshop: Workshop,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = tmp_path / "references"
    options = [*MAKE, *TRAIN, f"eval.references={references}"]
    words = workshop.overrides("emoji", *options, run=tmp_path / "run")
    stopped = run("tests.support.stop_at", "4", "SIGTERM", "trainer", *words)
    assert stopped.returncode == 85, stopped.stdout
    assert "asked to stop: step 0 is saved; the same command goes on" in stopped.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_00000000").is_dir()
    assert len(unfinished(references)) == 2

    phases: list[str] = []
    monkeypatch.setattr(Watchdog, "pause", lambda _, phase, step: phases.append(phase))
    assert fit(workshop.config("emoji", *options, run=tmp_path / "run")) == 0
    assert content(references) == whole
    assert phases.count("making references") == ROUNDS - 3, "a sign of life at every batch"
    assert sorted(losses(tmp_path / "run")) == [1, 2]

    # with the references there, the same training makes none and learns the same
    phases.clear()
    again = tmp_path / "again"
    assert fit(workshop.config("emoji", *options, run=again)) == 0
    assert "making references" not in phases
    assert losses(again) == losses(tmp_path / "run")


def test_ctrl_c_ends_an_evaluation_in_a_short_line_and_keeps_what_was_made(
    workshop: Workshop, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    options = [*MAKE, f"eval.references={tmp_path / 'references'}"]
    images = f"eval.images={workshop.folder / 'pictures'}"
    words = workshop.overrides("emoji", *options, images, run=tmp_path / "run")
    stopped = run("tests.support.stop_at", "3", "SIGINT", "trainer.evaluate", *words)
    assert stopped.returncode == 85, stopped.stdout
    assert "SIGINT: stopping after this batch" in stopped.stdout
    assert "the same command goes on" in stopped.stdout
    assert "Traceback" not in stopped.stdout
    assert not list((tmp_path / "run" / "evaluations").glob("*.json"))
    assert unfinished(tmp_path / "references")
    done = run("trainer.evaluate", *words)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "run" / "evaluations").glob("images_pictures_*.json"))) == 1
    assert content(tmp_path / "references") == whole


def test_a_first_stage_is_stopped_while_it_is_evaluated(workshop: Workshop, tmp_path: Path) -> None:
    options = [*TRAIN, "eval.features=[efficientnet_lite0]", "eval.batch_size=4"]
    words = workshop.overrides("emoji_autoencoder", *options, run=tmp_path)
    stopped = run("tests.support.stop_at", "2", "SIGTERM", "trainer", *words)
    assert stopped.returncode == 85, stopped.stdout
    assert "asked to stop: step 0 is saved" in stopped.stdout
    assert fit(workshop.config("emoji_autoencoder", *options, run=tmp_path)) == 0
    assert sorted(losses(tmp_path)) == [1, 2]
