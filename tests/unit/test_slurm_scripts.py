"""What the job scripts decide; tests/slurm runs them on a real cluster."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").glob("*.sh"))
# Stand-ins. Of Python, that gives the options' run folder when asked, and as a rank saves a
# checkpoint, where it is to, and ends with $CODE; of scontrol, that knows a job in state $STATE.
STAND_INS = {
    "python": """
if [[ "$*" == *--cfg* ]]; then echo "dir: run"; exit; fi
echo "python $*"
[[ -z $SAVES ]] || mkdir -p "run/checkpoints/$SAVES"
exit "$CODE"
""",
    "srun": """
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 "$@"
""",
    "scontrol": """
case $1 in
show) echo node1 ;;
--oneliner) echo "JobId=7 JobState=$STATE Reason=None" ;;
*) echo "scontrol $*" ;;
esac
""",
}


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
    """Runs a script among the stand-ins; what it starts ends with `code`."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(script: str, *words: str, code: int, **variables: str):
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "LF_PYTHON": "python",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "CODE": str(code),
            "SAVES": "",
            "STATE": "RUNNING",
            **variables,
        }
        return subprocess.run(
            ["bash", f"slurm/{script}.sh", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, False), (1, False), (70, True), (85, True), (86, True), (137, True)],
)
def test_training_passes_its_arguments_on_and_requeues_what_is_worth_it(submit, code, requeued):
    done = submit("train", "+experiment=laion_512", "sample.prompts=[an owl]", code=code)
    assert done.returncode == code
    assert "python -m trainer +experiment=laion_512 sample.prompts=[an owl]\n" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_an_error_after_a_new_checkpoint_is_worth_another_start(submit):
    for saves, requeued in (("step_00000500", True), ("step_00000500", False)):
        done = submit("train", code=1, SAVES=saves)
        assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_a_job_that_is_ended_from_outside_is_not_requeued(submit, state):
    assert "requeue" not in submit("train", code=85, STATE=state).stdout


def test_starts_without_progress_are_counted_and_progress_sets_the_count_back(submit):
    for saves in ("", "", "step_00000020", "", "", "", None):
        done = submit("train", code=70, SAVES=saves or "")
        if saves is None:
            assert done.returncode == 1
            assert "error: 3 starts of job 7 got no further than run/checkpoints" in done.stderr
            assert "requeue" not in done.stdout
        else:
            assert "scontrol requeue 7" in done.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (137, "2", True), (137, "3", False)],
)
def test_a_latent_task_that_is_killed_goes_back_into_the_queue(submit, code, restarts, requeued):
    array = {
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": restarts,
    }
    words = ["+experiment=laion_512", "precompute.workers=6"]
    done = submit("precompute", *words, code=code, **array)
    assert done.returncode == code
    assert (
        "python -m trainer.precompute +experiment=laion_512 precompute.workers=6 "
        "precompute.num_tasks=32 precompute.task=16" in done.stdout
    )
    assert ("scontrol requeue 5_14" in done.stdout) == requeued


def test_an_evaluation_ends_with_the_code_of_what_it_runs(submit):
    done = submit("evaluate", "+experiment=laion_512", code=1)
    assert done.returncode == 1
    assert "python -m trainer.evaluate +experiment=laion_512\n" in done.stdout
