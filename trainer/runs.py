"""The run folder: what is in it beside checkpoints, and what a run writes about itself."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from trainer.config import Config

PACKAGES = ("torch", "deepspeed", "xformers", "webdataset", "open_clip_torch", "numpy", "wandb")


def describe(config: Config) -> dict[str, object]:
    """The resolved config as plain values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def versions() -> dict[str, str]:
    """Of Python, of what the numbers depend on, and of this project's commit."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def open_run(config: Config) -> Path:
    """Create the run folder and write the config and the versions into it; for rank 0."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(describe(config), sort_keys=False))
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
    return folder
