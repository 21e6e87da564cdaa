"""Configs of plans with small networks."""

from tests.support.workshop import NETWORKS, RUN
from trainer.cli import load_config
from trainer.config import Config

ONE_GPU = ["plan.gpus_per_node=1"]


def small(experiment: str, *more: str) -> Config:
    """A config with small networks, planned for one GPU."""
    return load_config([f"+experiment={experiment}", *NETWORKS, *RUN, *ONE_GPU, *more])
