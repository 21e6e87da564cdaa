import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").glob("*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, Path(".ci/run")], ids=str)
def test_shellcheck_finds_nothing(script: Path):
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "--external-sources", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Runs a script, with stand-ins for Slurm's commands; what it starts ends with `code`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "srun": 'echo "srun $*"; exit "$SRUN_CODE"',
        "scontrol": '[[ $1 == show ]] && echo node1 || echo "scontrol $*"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(script: str, *words: str, code: int, **variables: str):
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SRUN_CODE": str(code),
            **variables,
        }
        return subprocess.run(
            ["bash", f"slurm/{script}.sh", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (85, True), (1, False)])
def test_training_passes_its_arguments_on_and_requeues_what_is_worth_it(submit, code, requeued):
    words = ["+experiment=laion_512", "optim.lr=1e-4"]
    done = submit("train", *words, code=code, SLURM_JOB_NODELIST="node[1-2]")
    assert done.returncode == code
    assert "-m trainer +experiment=laion_512 optim.lr=1e-4" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (137, "2", True), (137, "3", False), (138, "9", True)],
)
def test_a_latent_task_that_is_killed_goes_back_into_the_queue(submit, code, restarts, requeued):
    array = {
        "SLURM_ARRAY_TASK_ID": "12",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_RESTART_COUNT": restarts,
    }
    words = ["+experiment=laion_512", "precompute.workers=6"]
    done = submit("precompute", *words, code=code, **array)
    assert done.returncode == code
    assert (
        "-m trainer.precompute +experiment=laion_512 precompute.workers=6 "
        "precompute.task=2 precompute.num_tasks=4" in done.stdout
    )
    assert ("scontrol requeue 7" in done.stdout) == requeued
