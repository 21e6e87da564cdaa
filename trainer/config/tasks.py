"""The table of training tasks, for checks, training, plans and the report."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.choices import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """A training task, with functions by `module:function`: this page imports no torch."""

    problems: str
    """Maps a Config to an iterator of its contradictions, one line each. Its module imports no
    torch, because every command checks its config first."""
    build: str
    """Maps (Config, Ranks) to a TrainingTask: opens the data and loads the weights to start from.
    Raises ValueError or OSError that name the config path."""
    plan: str
    """Maps a Config to a StepPlan, without opening a file."""
    pictures: str
    """Title of the pictures of an evaluation in the report."""
    weights: str = ""
    """Config path of the weights file that a training begins with; empty: it reads none."""
    unread: Sequence[str] = ()
    """Sections and options of other tasks, which a training of this task does not read."""


TASKS = {
    Task.diffusion: TaskEntry(
        problems="trainer.checks:denoising_problems",
        unread=("autoencoder.loss", "autoencoder.codebook_decay", "autoencoder.codebook_revival"),
        build="trainer.train.denoiser:build_denoising",
        plan="trainer.train.denoising_plan:plan_denoising",
        pictures="Samples",
        weights="unet.weights",
    ),
    Task.autoencoder: TaskEntry(
        problems="trainer.checks:reconstruction_problems",
        unread=(
            "conditioner",
            "unet",
            "diffusion",
            "sampler",
            "data.latents",
            "data.store_text",
            "data.store_images",
        ),
        build="trainer.train.first_stage:build_first_stage",
        plan="trainer.train.first_stage:plan_first_stage",
        pictures="Reconstructions",
        weights="autoencoder.weights",
    ),
}
