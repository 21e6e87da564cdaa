"""The job scripts on a real cluster: an array of latents, the one log, and an end to restarts."""

import os
import shlex
import signal
import sys
from pathlib import Path

from data.shards.manifest import Manifest
from tests.support.data_sets import png
from tests.support.latent_jobs import TINY, folder_hashes, make_job
from tests.support.project import Project, python_processes
from trainer.precompute.job import precompute

SHARDS = 120


def test_a_latent_array_with_a_killed_task_completes(project: Project, tmp_path: Path) -> None:
    precompute(make_job(tmp_path, samples=2 * SHARDS, shard_samples=2))
    final = folder_hashes(tmp_path / "latents")
    latents = tmp_path / "array"
    overrides = [
        "+experiment=emoji",
        f"data.dir={tmp_path}",
        f"data.latents={latents}",
        f"autoencoder.weights={tmp_path / 'first_stage.safetensors'}",
        *TINY,
    ]
    job = project.submit("--array=0-1", "slurm/precompute.sh", *overrides)
    # its own number is that of the whole array: the other task must not start again with it
    last = f"{job}_1"
    project.wait(last, lambda: finished(latents, 1) > 0, "a shard of task 1")
    (process,) = python_processes(f"data.latents={latents}", LF_TASK="1")
    os.kill(process.pid, signal.SIGKILL)
    assert finished(latents, 1) < SHARDS // 2
    assert project.ended(f"{job}_0")["Restarts"] == "0"
    assert project.ended(last)["Restarts"] == "1"
    assert folder_hashes(latents) == final


def test_packing_runs_beside_the_gpus_with_many_cpus(project: Project, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(png(number))
        (images / f"{number}.txt").write_text(f"picture {number}")
    data = ["data.source.kind=folder", f"data.source.path={images}", f"data.dir={tmp_path}"]
    job = project.submit("--gpus-per-node=0", "slurm/pack.sh", "+experiment=emoji", *data)
    shown = project.ended(job)
    assert (int(shown["NumCPUs"]), shown["TresPerNode"]) == (16, "gres:gpu:0")
    assert Manifest.load(tmp_path / "train", option="data.train").samples > 0
    assert "data.train: " in project.log(job)


def finished(latents: Path, task: int) -> int:
    """Shards that one of two tasks has finished."""
    names = [path.name for path in latents.glob("*.receipt.json")]
    return sum(int(name.partition(".")[0][-6:]) % 2 == task for name in names)


def stand_in(folder: Path, body: str) -> str:
    """A program in Python's place; it tells the run folder, and does `body` as a rank."""
    program = folder / "python"
    asked = f"""
case "$*" in
*--cfg*) echo "dir: {folder}"; exit ;;
-m\\ trainer.run*) exec {shlex.quote(sys.executable)} "$@" ;;
esac"""
    program.write_text(f"#!/usr/bin/env bash\n{asked}\n{body}\n")
    program.chmod(0o755)
    return str(program)


def test_a_job_that_dies_at_the_same_step_again_and_again_ends_and_says_so(
    project: Project, tmp_path: Path
) -> None:
    newest = tmp_path / "checkpoints" / "step_00000500"
    newest.mkdir(parents=True)
    python = stand_in(tmp_path, "kill -SEGV $$")
    job = project.submit(
        "--nodes=2", "slurm/train.sh", "+experiment=emoji", LF_PYTHON=python, LF_STALLED_STARTS="2"
    )
    assert project.ended(job, "FAILED")["Restarts"] == "2"
    said = project.log(job)
    assert said.count("goes back into the queue: exit code 139 (killed by SIGSEGV) at") == 2
    assert (
        f"error: 2 starts of job {job} got no further than {tmp_path}/checkpoints/step_00000500"
        in said
    )


def test_a_log_has_lines_of_rank_0_as_they_are_and_the_others_behind_their_names(
    project: Project, tmp_path: Path
) -> None:
    """An error of one rank ends the job with its code, whatever that does to the others."""
    python = stand_in(
        tmp_path,
        'echo "I am $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on GPU $SLURM_LOCALID of'
        ' $CUDA_VISIBLE_DEVICES: $MASTER_ADDR, $*"\n'
        'if ((SLURM_PROCID == 2)); then echo "error: no" >&2; exit 1; fi\nsleep 60',
    )
    words = ["+experiment=emoji", "sample.prompts=[a red heart, an owl]"]
    options = ["--nodes=2", "--gpus-per-node=2", "--nodelist=node[1-2]"]
    job = project.submit(*options, "slurm/train.sh", *words, LF_PYTHON=python)
    shown = project.ended(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "1:0")
    said = project.log(job).splitlines()
    call = "of 0,1: node1, -m trainer +experiment=emoji sample.prompts=[a red heart, an owl]"
    assert f"I am 0 of 4 on GPU 0 {call}" in said
    assert f"[rank 1, node1] I am 1 of 4 on GPU 1 {call}" in said
    assert f"[rank 2, node2] I am 2 of 4 on GPU 0 {call}" in said
    assert f"[rank 3, node2] I am 3 of 4 on GPU 1 {call}" in said
    assert "[rank 2, node2] error: no" in said
