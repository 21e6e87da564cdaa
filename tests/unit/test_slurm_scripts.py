"""What the job scripts decide; tests/slurm runs them on a real cluster."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT
from trainer.cli import load_config
from trainer.runs.paths import CHECKPOINTS, STEPS, step_name
from trainer.runtime.launcher import CRASH_EXIT_CODE, MEANINGS, REQUEUE_EXIT_CODE, meaning

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").glob("*.sh"))
SUBMITTED = [path for path in SCRIPTS if path.name not in ("common.sh", "rank.sh")]
# Stand-ins. Of Python, that prints the options' folders when asked, leaves questions about run
# folders and exit codes to the real one, and as a rank saves $SAVES, a checkpoint or a part of
# references, and ends with $CODE; of scontrol, that knows a job in state $STATE.
STAND_INS = {
    "python": f"""
case "$*" in
*"--package run"*) printf %s "$SECTION"; exit ;;
*"--package eval"*) echo "references: made"; exit ;;
-m\\ trainer.run*) PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@" ;;
esac
echo "python $*"
echo "task ${{LF_TASK:-}}"
echo "memory $PYTORCH_ALLOC_CONF, forks $IBV_FORK_SAFE $RDMAV_FORK_SAFE"
[[ -z $SAVES ]] || mkdir -p -- "$RUN/{CHECKPOINTS}/$SAVES" made
[[ -z $SAVES ]] || touch "made/$SAVES"
exit "$CODE"
""",
    "srun": """
[[ $* == *--export=ALL* ]] || exit 3  # ranks need the variables of the script
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=${PROCID:-0} "$@"
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
def test_shellcheck_finds_nothing(script: Path) -> None:
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

    def run(
        script: str, *words: str, code: int, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "LF_PYTHON": "python",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "CODE": str(code),
            "SAVES": "",
            "RUN": "run",
            "SECTION": "dir: run",
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
    [(code, code > 1) for code in (*MEANINGS, 137)],
)
def test_training_passes_its_arguments_on_and_requeues_what_is_worth_it(
    submit: Submit, code: int, requeued: bool
) -> None:
    done = submit("train", "+experiment=laion_512", "sample.prompts=[an owl]", code=code)
    assert done.returncode == code
    assert "python -m trainer +experiment=laion_512 sample.prompts=[an owl]\n" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued
    assert (f"exit code {code} ({meaning(code)}) at the start of run" in done.stdout) == requeued


def test_an_error_after_a_new_checkpoint_is_worth_another_start(submit: Submit) -> None:
    for saves, requeued in ((step_name(500), True), (step_name(500), False)):
        done = submit("train", code=1, SAVES=saves)
        assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize("planted", ["open", "link"])
def test_compiled_code_comes_from_a_folder_of_this_user(
    submit: Submit, tmp_path: Path, planted: str
) -> None:
    folder = tmp_path / f"latent-foundry-{os.getuid()}"
    done = submit("train", code=0, TMPDIR=str(tmp_path))
    assert done.returncode == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    if planted == "open":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "other")
        folder.symlink_to("other")
    done = submit("train", code=0, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert f"error: other users can change {folder}" in done.stderr
    assert "python -m trainer " not in done.stdout


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_a_job_that_is_ended_from_outside_is_not_requeued(submit: Submit, state: str) -> None:
    assert "requeue" not in submit("train", code=REQUEUE_EXIT_CODE, STATE=state).stdout


def test_starts_without_progress_are_counted_and_progress_sets_the_count_back(
    submit: Submit,
) -> None:
    for saves in ("", "", step_name(20), "", "", "", None):
        done = submit("train", code=CRASH_EXIT_CODE, SAVES=saves or "")
        if saves is None:
            assert done.returncode == 1
            assert "error: 3 starts of job 7 got no further than run/checkpoints" in done.stderr
            assert "requeue" not in done.stdout
        else:
            assert "scontrol requeue 7" in done.stdout


def test_starts_that_others_end_are_not_counted(submit: Submit) -> None:
    for state in ("COMPLETING", "PENDING", "CANCELLED", "COMPLETING", "RUNNING"):
        done = submit("train", code=CRASH_EXIT_CODE, STATE=state)
        assert done.returncode == CRASH_EXIT_CODE, done.stderr
        assert ("scontrol requeue 7" in done.stdout) == (state == "RUNNING")


@pytest.mark.parametrize("folder", ["a: b", "x # y", "2024", "it's %j", "-n"])
def test_new_checkpoints_are_seen_whatever_the_run_folder_is_called(
    submit: Submit, folder: str
) -> None:
    section = yaml.safe_dump({"dir": folder})
    for step in range(1, 6):
        done = submit("train", code=1, SAVES=step_name(step), RUN=folder, SECTION=section)
        assert done.returncode == 1, done.stderr
        assert "scontrol requeue 7" in done.stdout


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({}, "memory expandable_segments:True, forks 1 1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1", "IBV_FORK_SAFE": "0"}, "memory a:1, forks 0 1"),
        ({"PYTORCH_ALLOC_CONF": "", "RDMAV_FORK_SAFE": ""}, "memory , forks 1 "),
    ],
)
def test_ranks_get_settings_of_memory_and_forks_unless_the_user_has_his_own(
    submit: Submit, own: dict[str, str], line: str
) -> None:
    assert line in submit("train", code=0, **own).stdout.splitlines()


@pytest.mark.parametrize("script", ["train", "reference", "pack", "evaluate"])
def test_a_job_makes_its_folder_of_logs(submit: Submit, tmp_path: Path, script: str) -> None:
    shutil.rmtree(tmp_path / "slurm" / "logs")
    assert submit(script, code=0).returncode == 0
    assert (tmp_path / "slurm" / "logs").is_dir()


@pytest.mark.parametrize("script", SUBMITTED, ids=str)
def test_a_job_that_was_submitted_elsewhere_says_so(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"error: submit from the project's folder, not from {tmp_path}\n"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (137, "2", True), (137, "3", False)],
)
def test_a_latent_task_that_is_killed_goes_back_into_the_queue(
    submit: Submit, code: int, restarts: str, requeued: bool
) -> None:
    array = {
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": restarts,
        "SLURMD_NODENAME": "node1",
        "PROCID": "3",
    }
    words = ["+experiment=laion_512", "precompute.workers=6"]
    done = submit("precompute", *words, code=code, **array)
    assert done.returncode == code
    assert (
        "[rank 3, node1] python -m trainer.precompute +experiment=laion_512 precompute.workers=6 "
        "precompute.num_tasks=32 precompute.task=${oc.env:LF_TASK}\n" in done.stdout
    )
    assert "[rank 3, node1] task 19\n" in done.stdout
    assert ("scontrol requeue 5_14" in done.stdout) == requeued


def test_a_task_gets_its_number_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LF_TASK", "19")
    words = ["precompute.num_tasks=32", "precompute.task=${oc.env:LF_TASK}"]
    assert load_config(["+experiment=emoji", *words]).precompute.task == 19


@pytest.mark.parametrize("code", [0, 1])
def test_packing_takes_the_cpus_of_its_node_and_what_it_is_told(submit: Submit, code: int) -> None:
    words = ["+experiment=laion_512", "data.source.workers=6"]
    done = submit("pack", *words, code=code, SLURM_CPUS_ON_NODE="16")
    assert done.returncode == code
    assert f"python -m trainer.pack data.source.workers=16 {' '.join(words)}\n" in done.stdout
    assert load_config(["data.source.workers=16", *words]).data.source.workers == 6


def test_what_python_knows_is_not_spelled_again() -> None:
    numbers = "|".join(str(code) for code in MEANINGS if code > 1)
    names = f"{CHECKPOINTS}|{STEPS.removesuffix('*')}"
    for path in [*SCRIPTS, Path("slurm/cluster.env")]:
        assert not re.search(rf"\b({numbers})\b|{names}", (ROOT / path).read_text()), path


def test_the_guide_lists_the_exit_codes() -> None:
    table = (ROOT / "docs" / "operations.md").read_text().partition("| exit code |")[2]
    rows = table.partition("\n\n")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", rows, re.M)} == MEANINGS.keys()


def test_an_evaluation_ends_with_the_code_of_what_it_runs(submit: Submit) -> None:
    done = submit("evaluate", "+experiment=laion_512", code=1)
    assert done.returncode == 1
    assert "python -m trainer.evaluate +experiment=laion_512\n" in done.stdout


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (70, True), (85, True)])
def test_references_are_made_by_starts_that_go_on(
    submit: Submit, code: int, requeued: bool
) -> None:
    done = submit("reference", "+experiment=laion_512", code=code)
    assert done.returncode == code
    assert "python -m trainer.reference +experiment=laion_512\n" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_references_that_get_no_further_are_given_up(submit: Submit) -> None:
    for saves in ("", "", "rows_0_64", "", "", "", None):
        done = submit("reference", code=85, SAVES=saves or "")
        if saves is None:
            assert done.returncode == 1
            assert "error: 3 starts of job 7 got no further than" in done.stderr
        else:
            assert "scontrol requeue 7" in done.stdout
