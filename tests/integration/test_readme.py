"""Every command that the documents show is run here, on the workshop's small data."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.makefile import commands
from tests.support.paths import ROOT
from tests.support.processes import Ended, run_command
from tests.support.workshop import Workshop
from trainer.cli import load_config

DOCUMENTS = [
    *("README.md", "docs/data.md", "docs/planning.md", "docs/sampling.md", "docs/evaluation.md"),
    *("docs/checkpoints.md", "conf/autoencoder/emoji_f4.md", "conf/clip/emoji.md"),
]
OTHERS_RUN_IT = {"make test": "the tests themselves", "git clone": "CI", "cd ": "CI"}
NEEDS_SLURM = "hydra/launcher=submitit_slurm"
"""Run by tests/slurm/test_sweep.py."""
PYTHON = ".venv/bin/python -m "
SAYS = {
    "--cfg": "run:",
    "verify=true": "verified: ",
    "stats=true": "contact sheet",
    "evaluate -m": "table, plot and pictures: ",
    "examples.minimal": "minimal.png: ",
    "trainer.clip": '"recall_at_1": ',
    "trainer.ema": "use it with checkpoint.load=",
    "trainer.evaluate": "numbers: ",
    "trainer.export": "for diffusers, with a model card: ",
    "trainer.pack": "nothing to do",
    "trainer.plan": "GPU-hours",
    "trainer.precompute": "nothing to do: all ",
    "trainer.reference": "images, in ",
    "trainer.report": "report.html",
    "trainer.sample": "; contact sheet: ",
    "trainer +experiment=emoji_autoencoder": "weights for autoencoder.weights: ",
    "trainer +experiment=emoji": "/checkpoints",
}
"""Part of a command → a part of its output; the first that is found in a command counts."""


def shown_commands() -> list[str]:
    commands: list[str] = []
    for document in DOCUMENTS:
        blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        commands += [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip()]
    shown = list(dict.fromkeys(commands))
    return [one for one in shown if not any(map(one.startswith, OTHERS_RUN_IT))]


SHOWN = shown_commands()
JOBS = [command for command in SHOWN if command.startswith(("sbatch ", "source "))]
RUN_HERE = [command for command in SHOWN if command not in JOBS and NEEDS_SLURM not in command]


@pytest.fixture(scope="module")
def ended(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, list[Ended]]:
    """How each command ends; they run in the order of the documents, as most need earlier ones."""
    folder = tmp_path_factory.mktemp("shown")
    return {
        command: [
            run_command(*adapted(shlex.split(one.removeprefix(PYTHON)), workshop, folder))
            for one in expanded(command)
        ]
        for command in RUN_HERE
    }


def test_the_documents_show_commands() -> None:
    assert len(RUN_HERE) > 15
    assert len(JOBS) > 4
    assert all(any(part in command for command in RUN_HERE) for part in SAYS)


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_that_is_shown_runs(command: str, ended: Mapping[str, list[Ended]]) -> None:
    assert ended[command]
    for one, shown in zip(ended[command], expanded(command), strict=True):
        assert one.code == 0, f"{shown}\n{one.said}"
        part = next(part for part in SAYS if part in shown)
        assert SAYS[part] in one.out, f"{shown}\n{one.said}"


@pytest.mark.parametrize("command", JOBS)
def test_a_job_that_is_shown_has_its_script_and_valid_options(command: str) -> None:
    program, *words = shlex.split(command)
    (script,) = [ROOT / word for word in words if word.startswith("slurm/")]
    assert script.exists()
    options = [word for word in words if "=" in word and not word.startswith("--")]
    if program == "sbatch":
        load_config(options)


def expanded(command: str) -> list[str]:
    """`make demo` stands for the commands it would run."""
    if command != "make demo":
        return [command]
    return [line for line in commands("demo") if " -m trainer" in line]


def adapted(words: list[str], workshop: Workshop, folder: Path) -> list[str]:
    """The module and its words, sent to the workshop."""
    if "trainer.report" in words:
        return [*words[:-1], str(folder / "emoji")]
    if "--cfg" in words or "trainer.plan" in words:
        return words
    if "examples.minimal" in words:
        latents, sheet = workshop.folder / "latents_4", folder / "minimal.png"
        return [*words, f"--latents={latents}", f"--out={sheet}", "--steps=2"]
    experiment = next(word for word in words if word.startswith("+experiment=")).partition("=")[2]
    # a run keeps the averages and weights that it began with: these are apart from the others
    own_names = [name for name in ("widths", "finetuned") if f"run.name={name}" in words]
    run = folder / (own_names[0] if own_names else experiment)
    small = workshop.overrides(experiment, "train.max_steps=2", run=run)
    own = [f"sample.out={folder / 'drawn'}"]
    if "checkpoint.load=runs/emoji/demo" in words:
        own.append(f"checkpoint.load={folder / 'emoji'}")
    if "trainer.clip" in words:
        own.append(f"clip.out={folder / 'clip.safetensors'}")
    if "trainer.reference" in words:
        own.append("eval.features=[efficientnet_lite0]")
    return [*words, *small[1:], *own]
