"""Every command that the documents show is run here, on the workshop's small data."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import Workshop
from trainer.cli import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *("README.md", "docs/data.md", "docs/planning.md", "docs/sampling.md", "docs/evaluation.md"),
    *("docs/checkpoints.md", "conf/autoencoder/emoji_f4.md", "conf/clip/emoji.md"),
]
OTHERS_RUN_IT = {"make test": "the tests themselves", "git clone": "CI", "cd ": "CI"}
NEEDS_SLURM = "hydra/launcher=submitit_slurm"
"""Run by tests/slurm/test_sweep.py."""


def shown_commands() -> list[str]:
    commands = []
    for document in DOCUMENTS:
        blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        commands += [line.partition(" #")[0].strip() for line in lines if line.strip()]
    return commands


def expanded(command: str) -> list[str]:
    """`make demo` stands for the commands it would run."""
    if command != "make demo":
        return [command]
    listed = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in listed.stdout.splitlines() if " -m trainer" in line]


def test_every_command_that_is_shown_runs(workshop: Workshop, tmp_path: Path):
    commands = [one for command in shown_commands() for one in expanded(command)]
    assert len(commands) > 8
    for command in commands:
        if NEEDS_SLURM in command or any(map(command.startswith, OTHERS_RUN_IT)):
            continue
        program, *words = shlex.split(command)
        if program in ("sbatch", "source"):
            arguments = [word for word in words if "=" in word and not word.startswith("--")]
            (script,) = [ROOT / word for word in words if word.startswith("slurm/")]
            assert script.exists()
            if program == "sbatch":
                load_config(arguments)
            continue
        assert program == ".venv/bin/python", command
        done = subprocess.run(
            [sys.executable, *adapted(words, workshop, tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def adapted(words: list[str], workshop: Workshop, run: Path) -> list[str]:
    """The command, sent to the workshop."""
    if "trainer.report" in words:
        return [*words[:-1], str(run / "emoji")]
    if "--cfg" in words or "trainer.plan" in words:
        return words
    experiment = next(word for word in words if word.startswith("+experiment=")).partition("=")[2]
    # a run keeps the averages that it began with: this one is apart from the others
    folder = run / ("widths" if "run.name=widths" in words else experiment)
    small = workshop.overrides(experiment, "train.max_steps=2", run=folder)
    own = [f"sample.out={run / 'drawn'}", f"conditioner.pretrained={run / 'clip.safetensors'}"]
    if "trainer.clip" not in words:
        own = own[:1]
    return [*words, *small[1:], *own]
