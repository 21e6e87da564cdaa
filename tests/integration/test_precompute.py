"""Latent jobs of several processes at once, some of them killed."""

import hashlib
import multiprocessing
import random
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import pytest

from data.codecs import decode_npy
from data.manifest import Manifest
from tests.latent_jobs import folder_hashes, job_config, make_job, run_task
from trainer.config import Config
from trainer.latents import precompute

SAMPLES, SHARD_SAMPLES = 150, 5
LONGEST_PAUSE_S = 0.2

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.latent_jobs"])  # a start then costs milliseconds


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
    process = processes.Process(target=run_task, args=(config, log))
    process.start()
    return process


@contextmanager
def watch(latents: Path, final: dict[str, str]) -> Iterator[None]:
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


def test_tasks_killed_at_random_moments_give_the_same_folder(undisturbed, tmp_path):
    check_kills(undisturbed, tmp_path, 8)


@pytest.mark.campaign
def test_many_tasks_killed_at_random_moments_give_the_same_folder(undisturbed, tmp_path):
    check_kills(undisturbed, tmp_path, 100)


def test_tasks_at_the_same_shards_share_the_work(undisturbed, tmp_path):
    final = folder_hashes(undisturbed / "latents")
    latents = tmp_path / "latents"
    latents.mkdir()
    config = job_config(undisturbed, f"data.latents={latents}")
    with watch(latents, final):
        tasks = [start(config) for _ in range(3)]
        for task in tasks:
            task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert folder_hashes(latents) == final
    said = (tmp_path / "latents.log").read_text()
    encoded = [int(count) for count in re.findall(r"(\d+) shards now", said)]
    assert sum(encoded) == SAMPLES // SHARD_SAMPLES
