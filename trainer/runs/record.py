"""Records in the run folder: the config and the versions of the software."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml

from data.secrets import public
from data.storage.atomic import remove_leftovers, write_atomic
from trainer.config import Config
from trainer.runs.paths import CONFIG, METRICS, QUARANTINE, VERSIONS

PACKAGES = ("torch", "deepspeed", "xformers", "webdataset", "open_clip_torch", "numpy", "wandb")


GIT_TIMEOUT_S = 10
UNKNOWN = "unknown"


def plain_config(config: Config) -> dict[str, Any]:
    """Return the resolved config as JSON values, secrets included: it stays in memory."""
    return {one.name: _plain(getattr(config, one.name)) for one in fields(config)}


def _plain(value: Any) -> Any:
    """Return a part of a config as JSON values, without omegaconf: it takes 200 times as long."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value.name if isinstance(value, Enum) else value


def public_config(config: Config) -> dict[str, Any]:
    """Return the resolved config as JSON values that may be written and sent: without secrets."""
    return public(plain_config(config))


def versions() -> dict[str, str]:
    """Return the versions of Python and PACKAGES, and this project's commit, or "unknown"."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_TIMEOUT_S,
        )
        commit = described.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or another user's
        commit = UNKNOWN
    return {**found, "commit": commit}


def open_run(config: Config, kernels: Mapping[str, str]) -> Path:
    """Create the run folder with config and versions, and return it; rank 0 alone calls it.

    kernels: names of chosen kernels by what they compute, which follow the versions.
    """
    folder = Path(config.run.dir)
    for name in (CONFIG, VERSIONS, METRICS, QUARANTINE):
        remove_leftovers(folder / name)
    write_atomic(folder / CONFIG, yaml.safe_dump(public_config(config), sort_keys=False).encode())
    write_atomic(folder / VERSIONS, json.dumps(versions() | dict(kernels), indent=1).encode())
    return folder
