"""The one way in: compose the experiment, check it as a whole, and only then import what runs it.

A command module names the function it stands for (`main("trainer.loop:fit")`), so that `--help`
and a typo answer before torch is imported.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import conf
import data
import models
import trainer
from trainer.checks import explain, to_config, world_size
from trainer.config import Config

TRAINING = "trainer.loop:fit"
"""Its ranks share the global batch; those of other commands may be any number."""
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError)

CRASH_EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""

ConfigStore.instance().store(name="schema", node=Config)


def main(target: str, *, point: str = "", summary: str = "") -> None:
    """Run `module:function` with the checked config and exit with the code that it returns.

    A command that can be swept (-m) names what takes the config of each point, and what is told of
    all of them at the end: a list of (swept options, config).
    A wrong config, a missing file or unusable data ends in one line and exit code 1; the stack
    trace follows where HYDRA_FULL_ERROR=1 asks for it. Anything else, such as a lost connection to
    another rank, ends in a stack trace and exit code 70: another start may do better.
    """
    show_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    ranks = world_size() if target == TRAINING else 1
    codes: list[int] = []
    errors: list[Exception] = []
    sweeps = bool(summary) and bool({"-m", "--multirun"} & set(sys.argv))
    if sweeps:
        target = point

    def job(tree: DictConfig) -> None:
        try:
            config = to_config(tree, ranks)
            codes.append(_load(target)(config) or 0)
        except USER_ERRORS as error:  # past this frame Hydra would add lines of its own
            errors.append(error)
            if sweeps:  # the other points go on, perhaps in another process than this one
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)

    try:
        _refuse_intruders()
        if "--cfg" in sys.argv or "-c" in sys.argv:
            _check_command_line(ranks)
        points = _points(sys.argv[1:]) if sweeps else []  # all are checked before any is run
        hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")(job)()
        if sweeps:
            codes.append(_load(summary)(points) or 0)
    except USER_ERRORS as error:
        errors.append(error)
    except Exception:
        traceback.print_exc()
        sys.exit(CRASH_EXIT_CODE)
    if errors:
        if show_trace:
            traceback.print_exception(errors[0])
        sys.exit(f"error: {explain(errors[0])}")
    sys.exit(max(codes, default=0))


def load_config(overrides: list[str], ranks: int = 1) -> Config:
    """Compose and check a config from Python, as the commands do; ranks: those that train.

    Raises: HydraException, OmegaConfBaseException or ValueError, as `main` would report them.
    """
    with initialize_config_module("conf", version_base="1.3"):
        return to_config(compose("config", overrides), ranks)


def _check_command_line(ranks: int) -> None:
    """`--cfg` prints without running the job, so what it prints is checked here."""
    load_config([word for word in sys.argv[1:] if "=" in word and word[0] != "-"], ranks)


def _points(words: list[str]) -> list[tuple[dict[str, str], Config]]:
    """What Hydra makes of a sweep's command line: swept options and config of each point."""
    overrides = [
        override
        for override in OverridesParser.create().parse_overrides(
            [word for word in words if not word.startswith("-")]
        )
        if not override.key_or_group.startswith("hydra")
    ]
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    (combinations,) = BasicSweeper.split_arguments(overrides, None)
    points = []
    for combination in combinations:
        parts = (word.partition("=") for word in combination)
        options = {key.lstrip("+"): value for key, _, value in parts if key in swept}
        points.append((options, load_config(list(combination))))
    return points


def _load(target: str) -> Callable[[Any], int | None]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _refuse_intruders() -> None:
    """An installed package of the same name would shadow ours without a word."""
    home = Path(__file__).resolve().parent.parent
    for package in (conf, data, models, trainer):
        found = Path(package.__path__[0]).resolve()
        if found.parent != home:
            raise ValueError(
                f"package {package.__name__!r} comes from {found}, not from {home}: "
                f"uninstall the intruder or start from {home}"
            )
