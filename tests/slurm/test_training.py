"""A training on a real cluster, through all that a cluster does to it: the loss curve stays.

The scenarios take minutes of waiting and little work, so they run side by side.
"""

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

import psutil
import pytest

from tests.support.project import Project, python_processes
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import latest_checkpoint
from trainer.train.loop import fit

STEPS = 24
TRAIN = [f"train.max_steps={STEPS}", "checkpoint.every=8", "train.micro_batch_size=2"]
TWO_NODES = ("--nodes=2", "--nodelist=node[1-2]")


class Stage:
    """Where a scenario plays: its run folder and the jobs that it submits."""

    def __init__(self, name: str, project: Project, workshop: Workshop, folder: Path) -> None:
        self.project, self.cluster = project, project.cluster
        self.run = folder / name
        self._overrides = workshop.overrides("emoji", *TRAIN, run=self.run)

    def train(self, *options: str) -> str:
        return self.project.submit(*options, "slurm/train.sh", *self._overrides)

    def evaluate(self, *options: str) -> str:
        return self.project.submit(*options, "slurm/evaluate.sh", *self._overrides)

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def wait_for_restart(self, job: str, number: int) -> None:
        self.project.wait(job, lambda: self.restarts(job) >= number, f"restart {number}")

    def wait_for_step(self, job: str, step: int) -> None:
        def reached() -> bool:
            return max(losses(self.run), default=0) >= step

        self.project.wait(job, reached, f"step {step}")

    def limit(self, job: str, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def hold_until_warned(self, job: str, number: int, ask: Callable[[], None]) -> None:
        """Let rank 1 stand still, and so all wait for it; ask for Slurm's warning and await it."""
        first = max(losses(self.run), default=0) if number > 1 else 0
        self.wait_for_step(job, first + 1)
        ranks = python_processes(f"run.dir={self.run}", SLURM_PROCID="1")

        def warned() -> bool:
            heard = self.project.log(job).count("SIGUSR1: stopping") >= number
            return heard or any(awaits(rank, signal.SIGUSR1) for rank in ranks)

        with suppress(psutil.NoSuchProcess):  # it may have heard the warning before, and be gone
            for rank in ranks:
                rank.suspend()
        ask()
        self.project.wait(job, warned, f"warning {number}")
        with suppress(psutil.NoSuchProcess):
            for rank in ranks:
                rank.resume()


def awaits(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a signal has come to a process that stands still."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    masks = re.findall(r"(?:Sig|Shd)Pnd:\t(\w+)", status)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def two_nodes(stage: Stage) -> None:
    """To the end; an evaluation has waited for it."""
    job = stage.train(*TWO_NODES)
    evaluation = stage.evaluate(f"--dependency=afterok:{job}", *TWO_NODES)
    stage.project.ended(job)
    stage.project.ended(evaluation)
    assert "num_samples  4" in stage.project.log(evaluation)
    assert len(list(stage.run.glob("evaluations/*.json"))) == 1


def four_nodes(stage: Stage) -> None:
    """To the end."""
    stage.project.ended(stage.train("--nodes=4"))


def time_limit(stage: Stage) -> None:
    """Near twice: with a limit of 5 minutes, the warning 300 s before it is due at once.

    The limit is that short only while a step runs. Slurm warns once, and running steps alone.
    """
    job = stage.train(*TWO_NODES, "--time=30", "--signal=USR1@300")
    for restart in (1, 2):
        stage.hold_until_warned(job, restart, lambda: stage.limit(job, minutes=5))
        stage.limit(job, minutes=30)
        stage.wait_for_restart(job, restart)
    stage.project.ended(job)
    assert stage.restarts(job) == 2
    said = stage.project.log(job)
    assert said.count("SIGUSR1: stopping after this step") == 2
    assert said.count("is saved; the same command goes on") == 2
    assert said.count("going on from") == 2


def preempted(stage: Stage) -> None:
    """By a job of a higher partition that needs the memory of one node."""
    job = stage.train("--partition=preemptible", "--mem=10000", *TWO_NODES)
    stage.wait_for_step(job, 2)
    urgent = ("--partition=urgent", "--nodelist=node1", "--mem=10000", "--output=/dev/null")
    stage.project.ended(stage.project.submit(*urgent, "--wrap=hostname"))
    stage.project.ended(job)
    assert stage.restarts(job) == 1
    said = stage.project.log(job)
    assert "is saved; the same command goes on" in said
    assert "going on from" in said


def dead_node(stage: Stage) -> None:
    """Not that of the batch script, which sees its other ranks fail."""
    job = start_on_nodes_3_and_4(stage)
    end_without_node_4(stage, job, starts=1)


def dead_nodes(stage: Stage) -> None:
    """First that of the batch script, and when it is back, the other one."""
    job = start_on_nodes_3_and_4(stage)
    stage.cluster.fail("node3")
    stage.wait_for_restart(job, 1)
    stage.wait_for_step(job, 18)
    assert stage.cluster.job(job)["NodeList"] == "node[2,4]"
    stage.cluster.restore("node3")
    end_without_node_4(stage, job, starts=2)


def end_without_node_4(stage: Stage, job: str, starts: int) -> None:
    stage.cluster.fail("node4")
    stage.project.ended(job)
    assert stage.cluster.job(job)["NodeList"] == "node[2-3]"
    stage.cluster.restore("node4")
    assert stage.project.log(job).count("going on from") == starts


def start_on_nodes_3_and_4(stage: Stage) -> str:
    job = stage.train("--nodes=2", "--exclude=node1")
    stage.wait_for_step(job, 9)
    assert stage.cluster.job(job)["NodeList"] == "node[3-4]"
    return job


def cancelled(stage: Stage) -> None:
    """For good: nothing puts it back into the queue."""
    job = stage.train(*TWO_NODES)
    stage.wait_for_step(job, 2)
    stage.cluster.run("scancel", job)
    stage.project.ended(job, "CANCELLED")
    assert stage.restarts(job) == 0


Scenario = Callable[[Stage], None]
# Those of a line follow one another: no other job is on the nodes that die.
LINES: list[list[Scenario]] = [
    [four_nodes, dead_node, dead_nodes],
    [time_limit],
    [two_nodes, preempted, cancelled],
]
TO_THE_END = [
    pytest.param(one.__name__, marks=[pytest.mark.campaign] if one is dead_nodes else [])
    for one in chain(*LINES)
    if one is not cancelled
]


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process, left alone."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert fit(workshop.config("emoji", *TRAIN, run=run)) == 0
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    return run


@pytest.fixture(scope="module")
def played(
    project: Project,
    workshop: Workshop,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[dict[str, tuple[Stage, Future[None]]]]:
    """The scenarios of the tests that are to run."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = " ".join(item.name for item in request.session.items)
    futures = {}
    with ExitStack() as stack:
        for line in LINES:
            worker = stack.enter_context(ThreadPoolExecutor(1))
            for scenario in (one for one in line if f"[{one.__name__}]" in chosen):
                stage = Stage(scenario.__name__, project, workshop, folder)
                futures[scenario.__name__] = stage, worker.submit(scenario, stage)
        yield futures


@pytest.mark.parametrize("scenario", TO_THE_END)
def test_the_run_is_that_of_one_undisturbed_process(
    scenario: str, played: dict[str, tuple[Stage, Future[None]]], undisturbed: Path
) -> None:
    stage, future = played[scenario]
    future.result()
    assert_close(losses(stage.run), losses(undisturbed))
    ours, theirs = [latest_checkpoint(run / "checkpoints") for run in (stage.run, undisturbed)]
    assert ours is not None
    assert theirs is not None
    for key in ("step", "cursor", "images_seen", "quarantine"):
        assert getattr(ours.training, key) == getattr(theirs.training, key)


@pytest.mark.parametrize("scenario", [cancelled.__name__])
def test_scancel_ends_a_run_for_good(
    scenario: str, played: dict[str, tuple[Stage, Future[None]]], undisturbed: Path
) -> None:
    stage, future = played[scenario]
    future.result()
    whole = losses(undisturbed)
    cut = losses(stage.run)
    assert 2 <= len(cut) < STEPS
    assert_close(cut, {step: whole[step] for step in cut})


def assert_close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5
