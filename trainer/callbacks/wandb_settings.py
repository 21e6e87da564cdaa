"""The arguments of wandb.init: the run's options first, then W&B's own variables, then defaults."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, WandbConfig, WandbMode

VARIABLES = ("MODE", "DISABLED", "PROJECT", "ENTITY", "RUN_ID", "RESUME", "DIR", "NAME")
"""Ends of the names of the variables that are read here."""
PROJECT = "latent-foundry"
MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "shared": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.disabled,
}
"""Value of WANDB_MODE → mode."""
RESUMES = ("allow", "must", "never", "auto")
FALSE = ("", "0", "false", "no", "off")


def chosen_mode(options: WandbConfig, variables: Mapping[str, str]) -> WandbMode:
    """Return the mode, never `auto`; an unknown WANDB_MODE is offline, with a line."""
    if options.mode is not WandbMode.auto:
        return options.mode
    if variables.get("WANDB_DISABLED", "").lower() not in FALSE:
        return WandbMode.disabled
    word = variables.get("WANDB_MODE", "").lower()
    if word in MODES:
        return MODES[word]
    if word:
        _warn(f"WANDB_MODE={word} is none of {', '.join(MODES)}: W&B is offline")
        return WandbMode.offline
    return WandbMode.online if variables.get("WANDB_API_KEY") else WandbMode.offline


def init_arguments(
    options: WandbConfig, run: RunConfig, run_id: str, variables: Mapping[str, str]
) -> dict[str, Any]:
    """Return the arguments of wandb.init except `config`; run_id: from trainer.runs.wandb_id."""
    resume = variables.get("WANDB_RESUME") or "allow"
    if resume not in RESUMES:
        _warn(f"WANDB_RESUME={resume} is none of {', '.join(RESUMES)}: it is ignored")
        resume = "allow"
    return {
        "project": options.project or variables.get("WANDB_PROJECT") or PROJECT,
        "entity": options.entity or variables.get("WANDB_ENTITY") or None,
        "name": variables.get("WANDB_NAME") or f"{run.experiment}/{run.name}",
        "id": run_id,
        "resume": resume,
        "dir": str(Path(variables.get("WANDB_DIR") or run.dir).expanduser().resolve()),
        "mode": chosen_mode(options, variables).value,
    }


def environment(variables: Mapping[str, str], mode: str) -> dict[str, str]:
    """Return the environment of the process of W&B, in which nothing contradicts the arguments.

    It names the mode, too: without, W&B sends figures of its own even if the run is offline.
    """
    read = {f"WANDB_{name}" for name in VARIABLES}
    kept = {name: value for name, value in variables.items() if name not in read}
    return kept | {"WANDB_MODE": mode}


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
