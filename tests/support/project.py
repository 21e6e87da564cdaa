"""A project folder on a cluster, and the jobs that run from it."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.cluster import Cluster
from tests.support.paths import ROOT

TIMEOUT_S = 480


@dataclass(frozen=True)
class Project:
    """A clone of the project, whose site settings are those of the cluster."""

    folder: Path
    cluster: Cluster

    def submit(self, *words: str | Path, **settings: str) -> str:
        """`sbatch WORDS…` from the project's folder; returns the job's number."""
        site = {
            "SBATCH_GPUS_PER_NODE": "1",
            "SBATCH_CPUS_PER_GPU": "1",
            "LF_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        return self.cluster.submit(*words, cwd=self.folder, **site | settings)

    def log(self, job: str) -> str:
        """The job's one log; empty before it starts."""
        found = list((self.folder / "slurm" / "logs").glob(f"*-{job}.log"))
        assert len(found) <= 1
        return found[0].read_text() if found else ""

    def wait(self, job: str, ready: Callable[[], bool], what: str) -> None:
        """Wait for something that happens while the job runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not ready():
            shown = self.cluster.job(job)
            ended = shown["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            if (ended and not ready()) or time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen: {shown}\n{self.log(job)[-5000:]}")
            time.sleep(0.2)

    def ended(self, job: str, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the job's end, and return what Slurm says of it then."""
        self.wait(job, lambda: self.cluster.job(job)["JobState"] == state, f"{state} of job {job}")
        return self.cluster.job(job)


def make_clone(folder: Path) -> Path:
    """The project's code as it is, and job scripts with logs of their own."""
    folder.mkdir(exist_ok=True)
    for name in ("conf", "data", "models", "trainer"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(
        ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log", "*.starts")
    )
    return folder


def python_processes(*words: str, **variables: str) -> list[psutil.Process]:
    """Python processes on any node, with these words and variables."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline", "environ"])
        if process.info["name"].startswith("python")
        and set(words) <= set(process.info["cmdline"] or [])
        and variables.items() <= (process.info["environ"] or {}).items()
    ]
