"""The points of a sweep (-m): combinations of the listed values, and a run folder for each."""

import itertools
import os
import re
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

# Hydra's sweeper is not public. It is the one that all launchers know.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from data.child_process import stop_with_parent
from data.secrets import redact
from trainer.runtime.launcher import REQUEUE_EXIT_CODE

OUR_SWEEP = {"dir": "${run.dir}/sweeps", "subdir": "."}
"""hydra.sweep in conf/config.yaml."""
LONGEST_NAME = 120
"""Longest name of a point's folder, in characters, before its hash."""


SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
"""hydra.sweeper._target_ of the only sweeper."""


def _launch(self: BasicSweeper, arguments: list[str]) -> None:
    """Launch all points, without Hydra's file multirun.yaml: it holds every option unredacted.

    arguments: overrides, with the values of swept options listed by commas.
    Raises: ValueError if the launcher fails, for example at Slurm.
    """
    assert self.launcher is not None
    parsed = OverridesParser.create().parse_overrides(arguments)
    first = 0
    _end_when_asked()
    # after such an end joblib's helper removes what the workers left, and would warn of each piece
    sys.warnoptions.append("ignore:resource_tracker")
    for batch in self.split_arguments(parsed, self.max_batch_size):
        try:
            jobs = self.launcher.launch(batch, initial_job_idx=first)
        except Exception as error:  # a launcher may raise anything; errors of jobs are in `jobs`
            raise ValueError(f"hydra/launcher: {error}") from error
        for ended in jobs:
            _ = ended.return_value  # raises the error of a job
        first += len(batch)


# Hydra makes no sweepers but those of its own packages. It has loaded them a second time.
_plugins: Any = Plugins.instance()
_plugins.class_name_to_class[SWEEPER].sweep = _launch


@contextmanager
def following(starter: int) -> Generator[None]:
    """Let the process of a point stop with the sweep while the block runs, and end afterwards.

    joblib's workers go on otherwise: they notice the end of the sweep after all of its points.
    Jobs of submitit do not end with the sweep. starter: process id of the sweep.
    """
    if os.getpid() == starter:
        _end_when_asked()  # the point before had handlers of its own
    if os.getpid() == starter or "joblib" not in HydraConfig.get().launcher._target_:
        yield
        return
    stop_with_parent(starter)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # between two points, end at once
        if os.getppid() != starter:
            os._exit(REQUEUE_EXIT_CODE)


def _end_when_asked() -> None:
    """Let SIGTERM or Ctrl-C end this process at once, after a line; its workers save their points.

    A point that runs in this process sets handlers of its own. joblib would kill its workers.
    """

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        print(f"{name}: the points stop; the same command goes on", flush=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def listed(words: Sequence[str], files: ConfigLoader) -> list[str]:
    """Return overrides with the values of each sweep listed by commas.

    So a shuffled sweep has one order, here and in Hydra, and a glob has found its files.
    files: those of conf/ and `--config-dir`.
    Raises: ValueError for a glob without a match.
    """
    found: list[str] = []
    for override in OverridesParser.create(files).parse_overrides(list(words)):
        word = override.input_line or ""
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            if not values:
                raise ValueError(f"{word}: nothing has such a name")
            word = f"{override.get_key_element()}={','.join(values)}"
        found.append(word)
    return found


def combine(words: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """Combine the values that are listed with commas.

    Returns the swept options and the overrides of each combination.
    """
    swept: set[str] = set()
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        key = override.get_key_element()
        choices[key] = [override.input_line or ""]
        if override.is_sweep_override():
            swept.add(key)
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    points: list[tuple[dict[str, str], list[str]]] = []
    for combination in itertools.product(*choices.values()):
        parts = (word.partition("=") for word in combination)
        options = {key.lstrip("+"): value for key, _, value in parts if key in swept}
        points.append((options, list(combination)))
    return points


def one_folder(options: Sequence[Mapping[str, str]], trees: Sequence[DictConfig]) -> None:
    """Leave all points in one run folder; raise ValueError if hydra.sweep asks for others."""
    if any(_sweep_settings(tree) != OUR_SWEEP for tree in trees):
        raise ValueError(
            "hydra.sweep has no effect: a sweep of evaluations writes into run.dir/sweeps"
        )


def own_folders(options: Sequence[Mapping[str, str]], trees: Sequence[DictConfig]) -> None:
    """Give each point a run folder of its own.

    It is run.dir, if that differs between the points. Else, or if hydra.sweep is set, it is a
    folder in hydra.sweep.dir, with the name hydra.sweep.subdir or that of the swept options.
    """
    asked = any(_sweep_settings(tree) != OUR_SWEEP for tree in trees)
    if len({tree.run.dir for tree in trees}) == len(trees) and not asked:
        return
    for number, (tree, swept) in enumerate(zip(trees, options, strict=True)):
        tree.hydra.job.num = number
        sweep = tree.hydra.sweep
        name = _folder_name(swept) if sweep.subdir == OUR_SWEEP["subdir"] else sweep.subdir
        tree.run.dir = str(Path(sweep.dir) / name)
    if len({tree.run.dir for tree in trees}) < len(trees):
        unnamed = "hydra.sweep.subdir gives several points one folder: add ${hydra.job.num} to it"
        raise ValueError(unnamed if asked else "two points are alike: list each value once")


def _sweep_settings(tree: DictConfig) -> object:
    return OmegaConf.to_container(tree.hydra.sweep, resolve=False)


def _folder_name(options: Mapping[str, str]) -> str:
    """Return the name of a point's folder, such as `optim.lr=0.001,run.seed=1`."""
    whole = ",".join(f"{path}={value}" for path, value in options.items())
    name = re.sub(r"[^\w.=,+-]", "_", redact(whole), flags=re.ASCII)[:LONGEST_NAME]
    return name if name == whole else f"{name}_{sha256(whole.encode()).hexdigest()[:8]}"
