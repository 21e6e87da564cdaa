"""The command line: compose a config, check it as a whole, then import the command and run it.

The `__main__.py` of a command names its function as a string (`main("trainer.train.loop:fit")`).
Therefore `--help` and a misspelt option are answered before torch is imported.
"""

import argparse
import atexit
import importlib
import itertools
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module

# Hydra's parser is not public. A parser of our own would accept other spellings (--cf, -cjob) than
# Hydra does, and would then check another config than Hydra prints.
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import conf
import data
import models
import trainer
from trainer.checks import explain, to_config
from trainer.config import Config
from trainer.multirun import (
    SWEEPER,
    combine,
    following,
    listed,
    one_folder,
    own_folders,
)
from trainer.options import help_text, is_switch
from trainer.runtime.compile_caches import use_private_caches
from trainer.runtime.launcher import CRASH_EXIT_CODE, world_size
from trainer.runtime.output import clean_output

USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    argparse.ArgumentError,
    ValueError,
    OSError,
)
NO_SWEEP = (
    "-m and hydra.mode=MULTIRUN sweep `python -m trainer` and `python -m trainer.evaluate` alone: "
    "start this command once for each value"
)
INSTEAD = {
    "run.dir": "give run.dir",
    "job.chdir": "paths begin in the folder where the command is started",
    "output_subdir": "the config of a run is in its config.yaml",
    "sweeper.params": "list the values on the command line, as in -m optim.lr=1e-3,1e-4",
}
"""Setting of Hydra that a command would not follow → the way that works."""
WIDEST_HELP = 100
LONGEST_NUMBER = 300
Job = Callable[[DictConfig], None]

ConfigStore.instance().store(name="schema", node=Config)


def main(
    target: str,
    *,
    about: str | None,
    options: str,
    shares_batch: bool = False,
    point: str = "",
    summary: str = "",
    has_own_folders: bool = False,
) -> None:
    """Compose and check the config, run a command with it, and exit.

    target: `module:function`; it takes a Config and returns the exit code, or None for 0.
    about: the docstring of the command's module, for --help.
    options: names of sections and options for --help, separated by spaces.
    shares_batch: whether the ranks share train.global_batch_size; else any number of ranks is fine.
    point, summary: two functions as `module:function`, of a command that can be swept (-m). The
    first takes the config of one point. The second takes a list of (swept options, config) after
    the last point.
    has_own_folders: whether each point of a sweep has a run folder of its own.
    Raises: SystemExit in every case. A wrong config, a missing file or unusable data ends in one
    line and exit code 1; HYDRA_FULL_ERROR=1 adds the stack trace. Any other error, such as a lost
    connection to another rank, ends in a stack trace and exit code 70: a new start may succeed.
    """
    with clean_output():
        code = _main(target, about, options, shares_batch, point, summary, has_own_folders)
    # after an error, collectives of this rank may never end; a job of ranks needs torch
    ranks = sys.modules.get("trainer.runtime.ranks")
    if ranks is not None and isinstance(code, int) and code != CRASH_EXIT_CODE:
        atexit.register(ranks.leave)  # not now: DeepSpeed keeps its groups
    sys.exit(code)


def _main(
    target: str,
    about: str | None,
    options: str,
    shares_batch: bool,
    point: str,
    summary: str,
    has_own_folders: bool,
) -> int | str:
    """Run a command; return its exit code, or the line that says what is wrong."""
    show_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    try:
        _refuse_intruders()
        arguments = _arguments(sys.argv[1:])
        ranks = world_size() if shares_batch else 1
        if arguments.help:
            width = min(shutil.get_terminal_size().columns, WIDEST_HELP)
            print(help_text(about or "", options.split(), width))
            return 0
        if arguments.multirun and not arguments.cfg:
            return _sweep(arguments, ranks, point, summary, has_own_folders)
        return _run(arguments, target, ranks)
    except USER_ERRORS as error:
        if show_trace:
            traceback.print_exc()
        return f"error: {explain(error)}"
    except Exception:
        traceback.print_exc()
        return CRASH_EXIT_CODE


def load_config(overrides: list[str], ranks: int = 1) -> Config:
    """Compose and check a config from Python, like the commands do.

    ranks: the number of ranks that share train.global_batch_size.
    Raises: HydraException, OmegaConfBaseException or ValueError; `main` prints these in one line.
    """
    with initialize_config_module("conf", version_base="1.3"):
        return to_config(compose("config", overrides), ranks)


def _arguments(command: Sequence[str]) -> argparse.Namespace:
    """Parse Hydra's switches and overrides in any order; Hydra wants overrides side by side."""
    parser = get_args_parser()
    parser.exit_on_error = False
    arguments, unknown = parser.parse_known_intermixed_args(command)
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: no such switch; --help and --hydra-help list them")
    for word in arguments.overrides:
        if not re.match(r"~.|[^=]+=", word):
            raise ValueError(f"{word[:60]!r} is neither a switch nor an option: write OPTION=VALUE")
        if re.search(rf"\d{{{LONGEST_NUMBER}}}", word):  # float() and int() fail without its name
            raise ValueError(f"{word[:60]}…: no option takes a number of so many digits")
    if arguments.experimental_rerun:
        raise ValueError("--experimental-rerun reads a pickle: give the options themselves")
    words = [word.lstrip("+").lower() for word in arguments.overrides]
    if any(word.startswith("hydra.sweeper.params") for word in words):  # omegaconf crashes at it
        raise ValueError(f"hydra.sweeper.params has no effect: {INSTEAD['sweeper.params']}")
    arguments.multirun = arguments.multirun or "hydra.mode=multirun" in words
    parsed = OverridesParser.create().parse_overrides(arguments.overrides)
    if arguments.multirun and arguments.cfg and any(one.is_sweep_override() for one in parsed):
        raise ValueError("--cfg prints the config of one point: give each option one value")
    return arguments


def _run(arguments: argparse.Namespace, target: str, ranks: int) -> int:
    codes: list[int] = []

    def job(tree: DictConfig) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise ValueError(NO_SWEEP)
        config = to_config(tree, ranks)
        codes.append(_load(target)(config) or 0)

    # before Hydra acts: it prints a config, or makes hydra.run.dir, without calling the job
    asked = arguments.hydra_help or arguments.shell_completion
    if not asked and arguments.info in (None, "all", "config"):
        _check(arguments, [arguments.overrides], ranks)
    _hydra(vars(arguments), job)
    return max(codes, default=0)


def _sweep(
    arguments: argparse.Namespace, ranks: int, point: str, summary: str, has_own_folders: bool
) -> int:
    if not summary:
        raise ValueError(NO_SWEEP)

    def list_values(tree: DictConfig) -> None:
        files = GlobalHydra.instance().config_loader()
        arguments.overrides = listed(arguments.overrides, files)

    _among_files(arguments, list_values)
    options, overrides = zip(*combine(arguments.overrides), strict=True)
    # check all points before the first one runs
    place = partial(own_folders if has_own_folders else one_folder, options)
    found = _check(arguments, overrides, ranks, place)
    folders = [config.run.dir for config in found]
    starter = os.getpid()

    def run_point(tree: DictConfig) -> None:
        number = HydraConfig.get().job.num
        tree.run.dir = folders[number]
        named = " ".join(f"{path}={value}" for path, value in options[number].items())
        print(f"point {number + 1} of {len(folders)}: {named}".rstrip(": "), flush=True)
        _load(point)(to_config(tree, ranks))

    def job(tree: DictConfig) -> None:
        # a launcher may run points in other processes
        with clean_output(), following(starter):
            try:
                run_point(tree)
            except USER_ERRORS as error:
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)

    _hydra(vars(arguments), job)
    return _load(summary)(list(zip(options, found, strict=True))) or 0


def _check(
    arguments: argparse.Namespace,
    points: Sequence[list[str]],
    ranks: int = 1,
    place: Callable[[list[DictConfig]], None] | None = None,
) -> list[Config]:
    """Compose and check the config of each list of overrides.

    The command line gives the config folders and the name of the primary config. place: sets the
    run folders of the points of a sweep.
    """
    _refuse_numbers(itertools.chain.from_iterable(points))
    name = arguments.config_name or "config"
    configs: list[Config] = []

    def job(tree: DictConfig) -> None:
        trees = [compose(name, overrides, return_hydra_config=True) for overrides in points]
        if OmegaConf.get_type(trees[0]) is Config:  # else to_config says what it lacks
            _refuse_settings(trees)
            if place is not None:
                place(trees)
        for one in trees:
            with open_dict(one):
                del one["hydra"]
        configs.extend(to_config(one, ranks) for one in trees)

    _among_files(arguments, job)
    return configs


def _among_files(arguments: argparse.Namespace, job: Job) -> None:
    """Call a job where Hydra finds the files of the command's config folders.

    Hydra's own tree is not used. conf/config.yaml keeps Hydra from creating output folders, and
    another primary config may not.
    """
    primary = (arguments.config_name or "config") if arguments.config_path else "config"
    places = {place: vars(arguments)[place] for place in ("config_dir", "config_path")}
    _hydra({**places, "config_name": primary, "overrides": []}, job)


def _refuse_numbers(words: Iterable[str]) -> None:
    """Raise ValueError for a number other than 0 and 1 where true or false is wanted.

    omegaconf takes any integer for true.
    """
    for override in OverridesParser.create().parse_overrides(list(dict.fromkeys(words))):
        path, value = override.get_key_element().lstrip("+"), override.value()
        if type(value) is int and value not in (0, 1) and is_switch(path):
            raise ValueError(f"{path}: {value} is no value; it must be true or false")


def _refuse_settings(trees: Iterable[DictConfig]) -> None:
    """Raise ValueError for a setting of Hydra that a command would not follow."""
    for tree, (path, instead) in itertools.product(trees, INSTEAD.items()):
        if tree.hydra.sweeper._target_ != SWEEPER:
            raise ValueError("hydra/sweeper has no effect: list the values that -m combines")
        if OmegaConf.select(tree.hydra, path) not in (None, False, "."):
            raise ValueError(f"hydra.{path} has no effect: {instead}")


def _hydra(arguments: Mapping[str, Any], job: Job) -> None:
    """Call Hydra with these arguments.

    Raises: the first error of the job. It does not pass through Hydra, which would print lines of
    its own.
    """
    errors: list[Exception] = []

    def keep_error(tree: DictConfig) -> None:
        try:
            job(tree)
        except USER_ERRORS as error:
            errors.append(error)

    sys.argv[1:] = _words(arguments)
    hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")(keep_error)()
    for error in errors:
        raise error


def _words(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a command line that Hydra's parser turns into these arguments."""
    for name, value in arguments.items():
        if name != "overrides" and value:
            switch = f"--{name.replace('_', '-')}"
            yield switch if value is True else f"{switch}={value}"
    yield from arguments["overrides"]


def _load(target: str) -> Callable[[Any], int | None]:
    use_private_caches()  # before torch is imported
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _refuse_intruders() -> None:
    """Raise ValueError if another installed package shadows one of ours."""
    home = Path(__file__).resolve().parent.parent
    for package in (conf, data, models, trainer):
        found = Path(package.__path__[0]).resolve()
        if found.parent != home:
            raise ValueError(
                f"package {package.__name__!r} comes from {found}, not from {home}: "
                f"uninstall the intruder or start from {home}"
            )
