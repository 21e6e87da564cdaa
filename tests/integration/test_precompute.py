"""Latent jobs of several processes at once, some of them killed."""

import hashlib
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import pytest

from data.shards.codecs import decode_npy
from data.shards.manifest import Manifest
from data.storage.lease import InUseError
from tests.support.latent_jobs import folder_hashes, job_config, make_job, run_task
from tests.support.processes import forks
from trainer.config import Config
from trainer.precompute.job import precompute

SAMPLES, SHARD_SAMPLES = 150, 5
LONGEST_PAUSE_S = 0.2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that one task has done in one go: every sample is there, once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    precompute(make_job(folder, SAMPLES, SHARD_SAMPLES))
    keys = []
    for path in sorted(folder.glob("latents/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".moments.npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    assert decode_npy(file.read()).shape == (2, 4, 4, 4)
                    keys.append(member.name.partition(".")[0])
    assert keys == [f"{number:09d}" for number in range(SAMPLES)]
    assert Manifest.load(folder / "latents", option="data.latents").samples == SAMPLES
    return folder


def start(config: Config) -> BaseProcess:
    log = Path(config.data.latents).with_suffix(".log")
    process = forks.Process(target=run_task, args=(config, log))
    process.start()
    return process


@contextmanager
def watch(latents: Path, final: dict[str, str]) -> Generator[None]:
    """Look all the time: whatever has a name is already what it will be in the end."""
    stop, wrong = Event(), []
    seen = set()

    def look() -> None:
        last = False
        while not last:
            last = stop.is_set()
            for path in latents.glob("[!.]*"):
                identity = (path.name, path.stat().st_ino)
                if identity not in seen:
                    seen.add(identity)
                    if hashlib.sha256(path.read_bytes()).hexdigest() != final.get(path.name):
                        wrong.append(path.name)
            time.sleep(0.001)

    thread = Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert {name for name, _ in seen} == {name for name in final if not name.startswith(".")}
    assert wrong == []


def kill_until_done(configs: list[Config], rng: random.Random) -> int:
    """Kill tasks at random moments and start them again until all is there; return the kills."""
    tasks = [start(config) for config in configs]
    manifest = Path(configs[0].data.latents) / "manifest.json"
    kills = 0
    while not manifest.exists():
        time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
        number = rng.randrange(len(tasks))
        tasks[number].kill()
        tasks[number].join()
        kills += tasks[number].exitcode == -signal.SIGKILL
        tasks[number] = start(configs[number])
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    return kills


def check_kills(undisturbed: Path, folder: Path, least: int) -> None:
    """Four tasks, two of them with a worker, as often as it takes."""
    final = folder_hashes(undisturbed / "latents")
    options = [f"data.latents={folder / 'latents'}", "precompute.num_tasks=4"]
    configs = [
        job_config(
            undisturbed, *options, f"precompute.task={task}", f"precompute.workers={task % 2}"
        )
        for task in range(4)
    ]
    rng = random.Random(0)
    kills = jobs = 0
    while kills < least:
        (folder / "latents").mkdir()
        with watch(folder / "latents", final):
            kills += kill_until_done(configs, rng)
        assert folder_hashes(folder / "latents") == final
        shutil.rmtree(folder / "latents")
        jobs += 1
    print(f"{kills} kills in {jobs} jobs")


def test_tasks_killed_at_random_moments_give_the_same_folder(
    undisturbed: Path, tmp_path: Path
) -> None:
    check_kills(undisturbed, tmp_path, 8)


@pytest.mark.campaign
def test_many_tasks_killed_at_random_moments_give_the_same_folder(
    undisturbed: Path, tmp_path: Path
) -> None:
    check_kills(undisturbed, tmp_path, 100)


def test_a_task_that_runs_is_not_started_twice(undisturbed: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    latents.mkdir()
    options = [f"data.latents={latents}"]
    first = start(job_config(undisturbed, *options))
    while not list(latents.glob(".task_0_of_1.lease")):
        time.sleep(0.005)
    os.kill(first.pid or 0, signal.SIGSTOP)
    for more, remedy in [
        ([], "precompute.task of its own"),
        (["precompute.num_tasks=2"], "with its precompute.num_tasks, not 2"),
    ]:
        with pytest.raises(InUseError, match=rf"process {first.pid}\).* {remedy}"):
            precompute(job_config(undisturbed, *options, *more))
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert folder_hashes(latents) == folder_hashes(undisturbed / "latents")
