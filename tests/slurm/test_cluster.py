"""The cluster leaves nothing behind, and says why it cannot be had."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import CannotRunSlurm, Cluster, check_machine, install
from tests.support.paths import ROOT

START = """
import sys, time
from pathlib import Path
from tests.support.cluster import Cluster
Cluster(Path(sys.argv[1]), nodes=2)
print("up", flush=True)
time.sleep(600)
"""


def processes_of(folder: Path) -> list[str]:
    """All whose environment names this cluster's configuration."""
    return [
        process.info["name"]
        for process in psutil.process_iter(["name", "environ"])
        if (process.info["environ"] or {}).get("SLURM_CONF") == str(folder / "slurm.conf")
    ]


def test_a_killed_test_run_leaves_nothing_running(cluster: Cluster, tmp_path: Path) -> None:
    assert len(processes_of(cluster.folder)) >= 3 * 6  # unshare, bash and a daemon each
    run = subprocess.Popen(
        [sys.executable, "-c", START, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    assert {"munged", "slurmctld", "slurmd"} <= set(processes_of(tmp_path))
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 30
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert cluster.run("sinfo", "--noheader")


def test_without_root_or_apt_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotRunSlurm, match=r"slurmd missing, and no apt-get"):
        install(["slurmd"], tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CannotRunSlurm, match="only root"):
        check_machine(tmp_path)
