"""Ctrl-C prints next to nothing, and no process outlives its command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.groups import decode_for_ever, members, wait_for_members
from tests.support.latent_jobs import job_config, make_job
from tests.support.paths import ROOT
from tests.support.processes import forks
from tests.support.workshop import Workshop
from trainer.runs.paths import checkpoints_in

MODULES = sorted(
    ".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "trainer").rglob("__main__.py")
)
TIMEOUT_S = 60


def imports(process: subprocess.Popen[str], library: str) -> bool:
    """Whether a process has begun to import a library."""
    assert process.poll() is None, process.communicate()
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_prints_at_most_three_lines(module: str, tmp_path: Path) -> None:
    """The command is importing its libraries, where an interrupt has the longest stack."""
    is_report = module == "trainer.report"
    words = [str(tmp_path)] if is_report else ["+experiment=emoji", f"run.dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not imports(process, "ft2font" if is_report else "libtorch"):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGINT, said
        assert len(said.splitlines()) <= 3, said
        assert not members(process.pid)


@pytest.mark.parametrize(
    "kills", [pytest.param(6, id="short"), pytest.param(50, marks=pytest.mark.campaign)]
)
def test_no_worker_outlives_precompute(kills: int, tmp_path: Path) -> None:
    make_job(tmp_path)
    config = job_config(tmp_path, "precompute.workers=2")
    ways = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    for number in range(kills):
        workers = tmp_path / f"workers_{number}"
        process = forks.Process(target=decode_for_ever, args=(config, workers))
        process.start()
        assert process.pid is not None
        deadline_s = time.monotonic() + TIMEOUT_S
        while not workers.exists() or len(workers.read_text().splitlines()) < 2:
            assert process.is_alive()
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        assert len(members(process.pid)) == 3
        os.kill(process.pid, ways[number % 3])
        process.join(TIMEOUT_S)
        assert process.exitcode == -ways[number % 3]
        wait_for_members(process.pid, 0, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_points_of_a_parallel_sweep_are_saved_and_end_with_it(
    number: signal.Signals, workshop: Workshop, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = workshop.overrides("emoji", "train.max_steps=100000", run=tmp_path)
    parallel = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optim.lr=1e-3,1e-4,1e-5"]
    said = tmp_path / "said"
    with said.open("w") as file:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "trainer", *parallel, *words],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    deadline_s = time.monotonic() + 3 * TIMEOUT_S
    while len(list(tmp_path.glob("sweeps/*/metrics.jsonl"))) < 2:
        assert sweep.poll() is None, said.read_text()
        assert time.monotonic() < deadline_s, said.read_text()
        time.sleep(0.05)
    # a terminal sends Ctrl-C to all processes
    (os.killpg if number == signal.SIGINT else os.kill)(sweep.pid, number)
    assert sweep.wait(TIMEOUT_S) == -number
    wait_for_members(sweep.pid, 0)
    lines = said.read_text().splitlines()
    told = lines.index(f"{number.name}: the points stop; the same command goes on")
    assert [line for line in lines[told + 1 :] if not line.startswith("step ")] == []
    folders = [path.parent for path in tmp_path.glob("sweeps/*/metrics.jsonl")]
    assert len(folders) == 2
    assert all(checkpoints_in(folder / "checkpoints") for folder in folders)
