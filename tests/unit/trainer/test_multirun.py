"""Sweeps (-m): their points, folders and launchers."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command_line import end_of, write_experiment
from trainer import cli
from trainer.config import Config
from trainer.multirun import combine


def watch_points(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[Config], list[tuple[Mapping[str, str], Config]]]:
    """Let `a:point` and `a:summary` keep what they are given; returns both lists."""
    points: list[Config] = []
    summarised: list[tuple[Mapping[str, str], Config]] = []
    opened = {"a:point": points.append, "a:summary": summarised.extend}
    monkeypatch.setattr(cli, "_load", opened.__getitem__)
    return points, summarised


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (["optim.lr=1e-3,1e-4"], ["sweeps/optim.lr=0.001", "sweeps/optim.lr=0.0001"]),
        (["run.name=a,b", "run.dir=r/${run.name}"], ["r/a", "r/b"]),
        (["optim.lr=1,2", "hydra.sweep.dir=s"], ["s/optim.lr=1", "s/optim.lr=2"]),
        (["optim.lr=1,2", "hydra.sweep.subdir=n${hydra.job.num}"], ["sweeps/n0", "sweeps/n1"]),
        (["optim.lr=1", "hydra.mode=MULTIRUN"], [""]),
        (
            ["eval.prompts=[a/b],[]"],
            ["sweeps/eval.prompts=_a_b__88fb9dd5", "sweeps/eval.prompts=___d69700b3"],
        ),
    ],
)
def test_each_point_of_a_sweep_of_trainings_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    folders: list[str],
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(cli, "_load", {"a:point": trained.append, "a:sum": len}.__getitem__)
    monkeypatch.chdir(tmp_path)
    own = [] if any("run.dir=" in word for word in words) else ["run.dir=r"]
    options = {"point": "a:point", "summary": "a:sum", "has_own_folders": True}
    switch = [] if "hydra.mode=MULTIRUN" in words else ["-m"]
    end = end_of(monkeypatch, *switch, "+experiment=emoji", *own, *words, **options)
    assert end == len(trained) == len(folders)
    assert [config.run.dir for config in trained] == [
        folder if folder.startswith(("r/", "s/")) else f"r/{folder}".rstrip("/")
        for folder in folders
    ]
    assert all(config.export.out == f"{config.run.dir}/export" for config in trained)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "optim.lr=1,2 hydra.sweep.subdir=all",
            "hydra.sweep.subdir gives several points one folder: add ${hydra.job.num} to it",
        ),
        ("optim.lr=1,1", "two points are alike: list each value once"),
        ("sampler=glob(x*)", "sampler=glob(x*): nothing has such a name"),
        ("hydra/launcher=basics", "hydra/launcher=basics is none of basic, "),
        ("hydra.sweeper._target_=x", "hydra/sweeper has no effect: list the values"),
    ],
)
def test_a_sweep_that_cannot_be_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, word: str, line: str
) -> None:
    words = ["-m", "+experiment=emoji", *word.split()]
    end = end_of(monkeypatch, *words, point="a:b", summary="a:b", has_own_folders=True)
    assert str(end).startswith(f"error: {line}")


def test_shuffled_sweeps_and_globs_run_the_points_that_they_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, summarised = watch_points(monkeypatch)
    order = iter([[0, 2, 1, 3], [3, 2, 1, 0]])
    monkeypatch.setattr(
        "hydra.core.override_parser.types.shuffle",
        lambda values: values.__setitem__(slice(None), [values[n] for n in next(order)]),
    )
    words = ["-m", "+experiment=emoji", f"run.dir={tmp_path}", "sampler=glob(*euler*)"]
    sweep = {"point": "a:point", "summary": "a:summary", "has_own_folders": True}
    assert end_of(monkeypatch, *words, "run.seed=shuffle(4,5,6,7)", **sweep) == 0
    assert [config.run.seed for config in trained] == 2 * [4, 6, 5, 7]
    assert [config.sampler.name for config in trained] == 4 * ["euler"] + 4 * ["euler_ancestral"]
    for (options, planned), config in zip(summarised, trained, strict=True):
        assert planned == config
        assert options == {"sampler": config.sampler.name, "run.seed": str(config.run.seed)}
        assert config.run.dir.endswith(f"/sampler={options['sampler']},run.seed={config.run.seed}")
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_points_in_processes_of_a_launcher_leave_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LF_PROMPT", "a C4nary")
    token = "hf_C4naryabcdefghijklmn"
    words = ["-m", "+experiment=emoji", f"run.dir={tmp_path / 'run'}", "run.seed=1,2"]
    words += ["eval.prompts=['${oc.env:LF_PROMPT}']", f"logger.wandb.entity=a,{token}"]
    words += ["hydra/launcher=submitit_local", f"hydra.launcher.submitit_folder={tmp_path / 'log'}"]
    sweep = {"point": "builtins:print", "summary": "builtins:len", "has_own_folders": True}
    assert end_of(monkeypatch, *words, **sweep) == 4
    logs = [path.read_text() for path in (tmp_path / "log").glob("*.out")]
    assert sum("global_batch_size=32" in log and "${oc.env:LF_PROMPT}" in log for log in logs) == 4
    assert not [log for log in logs if "C4nary" in log]
    folders = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not [name for name in folders if "C4nary" in name or "multirun" in name]


def test_a_launcher_that_fails_ends_the_sweep_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slurm's job refuses, for example."""
    (tmp_path / "file").touch()
    words = ["-m", "+experiment=emoji", f"run.dir={tmp_path}", "hydra/launcher=submitit_local"]
    words += [f"hydra.launcher.submitit_folder={tmp_path}/file/log", "run.seed=1,2"]
    end = end_of(monkeypatch, *words, point="a:b", summary="a:b", has_own_folders=True)
    assert str(end).startswith("error: hydra/launcher: ")
    assert "\n" not in str(end)


def test_every_point_of_a_sweep_is_composed_as_hydra_runs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, summarised = watch_points(monkeypatch)
    write_experiment(tmp_path)
    words = ["-m", "--config-dir", str(tmp_path), "+experiment=mine", f"run.dir={tmp_path}"]
    sweep = {"point": "a:point", "summary": "a:summary"}
    end = end_of(monkeypatch, *words, "+sampler.steps=range(2,4)", **sweep)
    assert end == "error: Could not append to config. An item is already at 'sampler.steps'."
    assert not measured
    end = end_of(monkeypatch, *words, "sampler=heun", "sampler.steps=range(2,4)", **sweep)
    assert end == 0
    assert [config for _, config in summarised] == measured
    assert [options for options, _ in summarised] == [
        {"sampler.steps": "2"},
        {"sampler.steps": "3"},
    ]
    assert [config.sampler.steps for config in measured] == [2, 3]
    assert {config.run.experiment for config in measured} == {"mine"}
    said = capsys.readouterr().out.splitlines()
    assert said == ["point 1 of 2: sampler.steps=2", "point 2 of 2: sampler.steps=3"]


def test_no_point_is_run_where_one_contradicts_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--multi", "+experiment=emoji", f"run.dir={tmp_path / 'run'}", "sampler.eta=0,7"]
    end = end_of(monkeypatch, *words, "sampler=ddim", point="no:where", summary="no:where")
    assert end == "error: sampler.eta=7.0 must be a number ≥ 0 and ≤ 1 [share]"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [
        "+experiment=emoji sampler=ddim,heun sampler.steps=1,2 eval.seed=3",
        "run.name=a,'b,c' ~data.filters sampler.eta=range(0,1,step=0.5)",
        "++eval.seed=1,2 optim.lr=1 optim.lr=2 eval.prompts=[a,b],[c]",
        "checkpoint.load=choice(x,y) sampler.steps=shuffle(1,1)",
    ],
)
def test_combinations_are_those_of_hydras_sweeper(line: str) -> None:
    assert_combined(shlex.split(line, posix=False))


PATHS = st.sampled_from(["sampler.steps", "run.seed", "optim.lr", "eval.prompts", "sampler"])
VALUE = st.sampled_from(["1", "0.5", "ddim", "[a,b]", "'b,c'", "{x:1}", "a b"])
SWEEPS = (
    st.lists(VALUE, min_size=1, max_size=3).map(",".join)
    | st.lists(VALUE, min_size=1, max_size=3).map(lambda values: f"choice({','.join(values)})")
    | st.tuples(st.integers(0, 3), st.integers(4, 6)).map(
        lambda ends: f"range({ends[0]},{ends[1]})"
    )
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["", "+", "++"]), PATHS, SWEEPS), max_size=3))
def test_any_combinations_are_those_of_hydras_sweeper(parts: list[tuple[str, str, str]]) -> None:
    assert_combined([f"{sign}{path}={values}" for sign, path, values in parts])


def assert_combined(words: list[str]) -> None:
    overrides = OverridesParser.create().parse_overrides(words)
    (expected,) = BasicSweeper.split_arguments(overrides, None)
    points = [load for _, load in combine(words)]
    parse = OverridesParser.create().parse_overrides
    assert [[str(one.value()) for one in parse(point)] for point in points] == [
        [str(one.value()) for one in parse(point)] for point in expected
    ]
