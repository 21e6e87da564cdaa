"""A sweep whose points are jobs of a real cluster, killed half-way and started again."""

from pathlib import Path

from tests.support import sweeps
from tests.support.cluster import Cluster
from tests.support.workshop import Workshop

LAUNCHER = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.partition=gpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=10",
    "hydra.launcher.array_parallelism=3",
    "hydra.launcher.name=sweep",
]


def test_a_sweep_of_jobs_is_killed_half_way_and_ends_with_the_same_table(
    cluster: Cluster, workshop: Workshop, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    local = sweeps.train(workshop, run)
    command = [*local, *LAUNCHER]
    sweeps.kill_half_way(sweeps.start(command, cluster.environment), run)
    cluster.run("scancel", "--name=sweep")
    done = len(sweeps.points(run))
    assert 2 <= done < sweeps.POINTS
    again = sweeps.start(command, cluster.environment)
    ended = again.finish(timeout_s=400)
    assert ended.code == 0, ended.said
    assert sweeps.table(run) == sweeps.undisturbed_table(local, run, tmp_path / "copy")
    assert cluster.run("squeue", "--noheader", "--name=sweep") == ""
