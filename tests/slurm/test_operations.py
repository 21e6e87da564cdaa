"""The guide in docs/operations.md, followed to its end on a real cluster."""

import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.project import TIMEOUT_S, Project, make_clone
from tests.support.workshop import Workshop, losses

CI_DOES_IT = ("git clone ", "make ")
STEPS = 36
# A program of the clone's environment, which makes the experiment small.
PROGRAM = """#!/usr/bin/env bash
for word; do
  shift
  set -- "$@" "$word"
  if [[ $word == +experiment=* ]]; then set -- "$@" {small}; fi
done
exec {program} "$@"
"""


def guide() -> list[str]:
    """Its commands."""
    text = (ROOT / "docs" / "operations.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    return [line for line in blocks.replace("\\\n", " ").splitlines() if line]


def prepare(clone: Path, workshop: Workshop) -> None:
    """What the guide's first section has a person do: an environment, and the site's settings."""
    small = [
        word
        for word in workshop.overrides("emoji", f"train.max_steps={STEPS}", "checkpoint.every=12")
        if not word.startswith(("+experiment", "run.dir"))
    ]
    small += [f"data.dir={clone / 'datasets'}", f"data.latents={clone / 'latents'}"]
    small += ["train.micro_batch_size=2"]
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name, program in (
        ("python", [sys.executable]),
        ("torchrun", [sys.executable, "-m", "torch.distributed.run"]),
    ):
        path = clone / ".venv" / "bin" / name
        path.write_text(PROGRAM.format(small=shlex.join(small), program=shlex.join(program)))
        path.chmod(0o755)
    settings = clone / "slurm" / "cluster.env"
    text = settings.read_text()
    for name in ("GPUS_PER_NODE", "CPUS_PER_GPU"):
        assert f"SBATCH_{name}:-8" in text
        text = text.replace(f"SBATCH_{name}:-8", f"SBATCH_{name}:-1")
    settings.write_text(text)


class Person:
    """Types commands into one shell, and looks what came of them."""

    def __init__(self, project: Project) -> None:
        self.project, self.cluster = project, project.cluster
        self.run = project.folder / "runs" / "emoji" / "cluster"
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=project.folder,
            env=self.cluster.environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, command: str) -> str:
        """Returns what the command says."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}\necho =$?=\n")
        self._shell.stdin.flush()
        said = ""
        for line in self._shell.stdout:
            code = re.search(r"=(\d+)=$", line)
            if code:
                assert code[1] == "0", f"{command}: {said}"
                return said
            said += line
        raise AssertionError(f"{command} ended the shell: {said}")

    def wait_for(self, ready: Callable[[str], bool], what: str) -> None:
        """Wait for something in the life of the training that was submitted last."""
        job = self.type("echo $training").strip()
        self.project.wait(job, lambda: ready(job), what)

    def trains(self, job: str) -> bool:
        return max(losses(self.run), default=0) > 1

    def has_restarted(self, job: str) -> bool:
        return self.cluster.job(job)["Restarts"] == "1"

    def wait_for_all(self) -> None:
        """Until the queue is empty."""
        deadline = time.monotonic() + TIMEOUT_S
        while waiting := self.cluster.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, waiting
            time.sleep(0.5)

    def leave(self) -> None:
        self._shell.communicate()


def test_every_command_of_the_guide_works_in_its_place(
    project: Project, workshop: Workshop, tmp_path: Path
) -> None:
    clone = make_clone(tmp_path / "latent-foundry")
    prepare(clone, workshop)
    person = Person(Project(clone, project.cluster))
    for command in guide():
        if command.startswith("tail "):
            person.wait_for(person.trains, "a step")
        elif command == "scancel $training":
            person.wait_for(person.has_restarted, "another start")
        elif command.startswith(".venv/bin/") and "run.name=cluster" in command:
            person.wait_for_all()
        if not command.startswith(CI_DOES_IT):
            person.type(command)
    person.leave()
    assert sorted(losses(person.run)) == list(range(1, STEPS + 1))
    assert (person.run / "report.html").exists()
    (evaluation,) = (person.run / "evaluations").glob("*.json")
    assert evaluation.name.startswith(f"step_{STEPS:08d}")
    logs = (clone / "slurm" / "logs").glob("*.log")
    jobs = Counter(path.name.partition("-")[0] for path in logs)
    assert jobs == {"pack": 1, "precompute": 2, "train": 2, "evaluate": 1}
