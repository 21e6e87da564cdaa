"""The way in: Hydra's switches in every spelling, sweeps, exit codes, and the doors of commands."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.support.paths import ROOT
from trainer import cli
from trainer.config import Config
from trainer.multirun import combine

CONTRADICTION = ["+experiment=emoji", "data.lanes=5"]
REFUSED = "error: data.lanes=5 does not divide train.global_batch_size=32"


def run(monkeypatch: pytest.MonkeyPatch, *words: str, **options: Any) -> object:
    """The exit code of a command, or the line that it ends in."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    given: dict[str, Any] = {
        "target": "nowhere:nothing",
        "about": "About.",
        "options": "task",
        **options,
    }
    with pytest.raises(SystemExit) as end:
        cli.main(given.pop("target"), **given)
    return end.value.code


def write_experiment(folder: Path, more: str = "") -> None:
    """An experiment outside conf/, for --config-dir."""
    (folder / "experiment").mkdir()
    text = f"# @package _global_\ndefaults: [emoji]\nrun: {{experiment: mine}}\n{more}\n"
    (folder / "experiment" / "mine.yaml").write_text(text)


@pytest.mark.parametrize(
    "switches",
    [
        "--cfg job",
        "--cfg=job",
        "-c job",
        "-cjob",
        "--cf job",
        "--cf=job",
        "--cfg hydra",
        "-call",
        "--cfg job --resolve",
        "--cfg=job --res",
        "--cfg job --package train",
        "-cjob -p train",
        "-cjob -ptrain --resolve",
        "--info",
        "--info config",
        "--info=all",
        "-iconfig",
        "--run",
        "-r",
        "-cjob --config-name config",
        "-cjob -cn=config",
        "-cjob -cd conf",
        "-cjob --config-dir=conf",
        "-cjob --config-path pkg://conf",
        "-cjob -cp pkg://conf",
    ],
)
def test_a_contradiction_is_refused_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], switches: str
) -> None:
    monkeypatch.chdir(ROOT)
    first, second = CONTRADICTION
    assert run(monkeypatch, first, second, *switches.split()) == REFUSED
    assert capsys.readouterr() == ("", "")


def test_switches_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = CONTRADICTION
    assert run(monkeypatch, "--cfg=job", first, second) == REFUSED
    assert run(monkeypatch, first, "--cfg", "job", second, "-p", "train") == REFUSED
    assert run(monkeypatch, "-cjob", first, "--resolve", second) == REFUSED


@pytest.mark.parametrize("switches", ["-cjob -ptrain", "--cf=job --package train --resolve"])
def test_cfg_prints_what_was_checked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    switches: str,
) -> None:
    (tmp_path / "experiment").mkdir()
    mine = (
        "# @package _global_\ndefaults: [emoji]\nrun: {experiment: mine}\ntrain: {max_steps: 7}\n"
    )
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    words = ["+experiment=mine", "-cd", str(tmp_path), *switches.split()]
    assert run(monkeypatch, *words, "train.log_every=3") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# @package train\nmax_steps: 7\n")
    assert "log_every: 3\n" in printed
    wrong = run(monkeypatch, *words, "train.log_every=3", "data.lanes=5")
    assert wrong == "error: data.lanes=5 does not divide train.global_batch_size=32"


def test_a_config_of_ones_own_needs_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    words = ["-cd", str(tmp_path), "-cn", "own", "-cjob", "-prun", "run.name=here"]
    own.write_text("defaults: [experiment: emoji]\n")
    for switches in (words, [word for word in words if word not in ("-cjob", "-prun")]):
        assert run(monkeypatch, *switches) == (
            "error: this config lacks its schema: begin its defaults with `- config`"
        )
    assert list(tmp_path.iterdir()) == [own]
    own.write_text("defaults: [config, experiment: emoji, _self_]\n")
    assert run(monkeypatch, *words) == 0
    assert "name: here\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--cgf", "job"], "--cgf job: no such switch; --help and --hydra-help list them"),
        (["--cfg", "jbo"], "argument --cfg/-c: invalid choice: 'jbo'"),
        (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg"),
        (["optim.lr"], "'optim.lr' is neither a switch nor an option: write OPTION=VALUE"),
        (["=3"], "'=3' is neither a switch nor an option"),
        ([""], "'' is neither a switch nor an option"),
        (["optim.lr=1,2"], "optim.lr has several values: use -m to sweep, [] for a list"),
        (["+sampler=ddim"], "sampler is chosen already: write sampler=ddim on the command line"),
        (["--config-path", str(ROOT / "docs"), "-cn", "a"], "Cannot find primary config 'a'"),
        (["--experimental-rerun", "a"], "--experimental-rerun reads a pickle"),
        (["optim.lr=" + 400 * "9"], "optim.lr=9999999999"),
        (["--config-dir", "nowhere"], "Additional config directory"),
        (["--config-name", "nothing"], "Cannot find primary config 'nothing'"),
    ],
)
def test_switches_that_cannot_be_followed_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    end = run(monkeypatch, "+experiment=emoji", *words)
    assert isinstance(end, str)
    assert end.startswith(f"error: {line}")
    assert "\n" not in end
    assert capsys.readouterr() == ("", "")


def test_switches_of_hydra_stay_hydras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--hydra-help") == 0
    assert "Hydra (" in capsys.readouterr().out
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("Hydra 1.3")


@pytest.mark.parametrize("switch", ["-m", "--multi", "-rm", "hydra.mode=MULTIRUN"])
def test_a_command_that_cannot_sweep_trains_no_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, switch: str
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(cli, "_load", lambda target: trained.append)
    words = ["+experiment=emoji", "optim.lr=1,2", f"run.dir={tmp_path / 'run'}"]
    end = run(monkeypatch, switch, *words)
    assert isinstance(end, str)
    assert "sweep `python -m trainer` and `python -m trainer.evaluate` alone" in end
    assert not trained


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("hydra.run.dir=out", "hydra.run.dir has no effect: give run.dir"),
        ("hydra.job.chdir=true", "hydra.job.chdir has no effect: paths begin"),
        ("hydra.output_subdir=.hydra", "hydra.output_subdir has no effect: the config"),
        ("+hydra.sweeper.params={a:b}", "hydra.sweeper.params has no effect: list the values"),
        ("-m optim.lr=1,2 --cfg=job", "--cfg prints the config of one point"),
        ("-m hydra.sweep.dir=out", "hydra.sweep has no effect: a sweep of evaluations"),
    ],
)
def test_a_setting_of_hydra_without_effect_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = {"point": "no:where", "summary": "no:where"}
    end = run(monkeypatch, "+experiment=emoji", *word.split(), **sweep)
    assert str(end).startswith(f"error: {line}")
    assert not list(tmp_path.iterdir())


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
    end = run(monkeypatch, *switch, "+experiment=emoji", *own, *words, **options)
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
    end = run(monkeypatch, *words, point="a:b", summary="a:b", has_own_folders=True)
    assert str(end).startswith(f"error: {line}")


def test_shuffled_sweeps_and_globs_run_the_points_that_they_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Config] = []
    summarised: list[tuple[Mapping[str, str], Config]] = []
    opened = {"a:point": trained.append, "a:sum": summarised.extend}
    monkeypatch.setattr(cli, "_load", opened.__getitem__)
    order = iter([[0, 2, 1, 3], [3, 2, 1, 0]])
    monkeypatch.setattr(
        "hydra.core.override_parser.types.shuffle",
        lambda values: values.__setitem__(slice(None), [values[n] for n in next(order)]),
    )
    words = ["-m", "+experiment=emoji", f"run.dir={tmp_path}", "sampler=glob(*euler*)"]
    sweep = {"point": "a:point", "summary": "a:sum", "has_own_folders": True}
    assert run(monkeypatch, *words, "run.seed=shuffle(4,5,6,7)", **sweep) == 0
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
    assert run(monkeypatch, *words, **sweep) == 4
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
    end = run(monkeypatch, *words, point="a:b", summary="a:b", has_own_folders=True)
    assert str(end).startswith("error: hydra/launcher: ")
    assert "\n" not in str(end)


def test_every_point_of_a_sweep_is_composed_as_hydra_runs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Config] = []
    summarised: list[tuple[Mapping[str, str], Config]] = []
    opened = {"here:point": measured.append, "here:summary": summarised.extend}
    monkeypatch.setattr(cli, "_load", opened.__getitem__)
    write_experiment(tmp_path)
    words = ["-m", "--config-dir", str(tmp_path), "+experiment=mine", f"run.dir={tmp_path}"]
    sweep = {"point": "here:point", "summary": "here:summary"}
    end = run(monkeypatch, *words, "+sampler.steps=range(2,4)", **sweep)
    assert end == "error: Could not append to config. An item is already at 'sampler.steps'."
    assert not measured
    end = run(monkeypatch, *words, "sampler=heun", "sampler.steps=range(2,4)", **sweep)
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


@pytest.mark.parametrize("word", ["data.flip=2", "++data.flip=-1", "data.flip=1,2"])
def test_a_number_is_neither_true_nor_false(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    switch = ["-m"] if "," in word else []
    end = run(monkeypatch, *switch, "+experiment=emoji", word, point="a:b", summary="a:b")
    assert end == f"error: data.flip: {word[-2:].strip(',=')} is no value; it must be true or false"


def test_no_point_is_run_where_one_contradicts_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--multi", "+experiment=emoji", f"run.dir={tmp_path / 'run'}", "sampler.eta=0,7"]
    end = run(monkeypatch, *words, "sampler=ddim", point="no:where", summary="no:where")
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
    words = shlex.split(line, posix=False)
    overrides = OverridesParser.create().parse_overrides(words)
    (expected,) = BasicSweeper.split_arguments(overrides, None)
    points = [load for _, load in combine(words)]
    parse = OverridesParser.create().parse_overrides
    assert [[str(one.value()) for one in parse(point)] for point in points] == [
        [str(one.value()) for one in parse(point)] for point in expected
    ]


def test_the_batch_must_divide_among_the_launched_ranks_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ("+experiment=emoji", "--cfg=job")
    end = run(monkeypatch, *words, shares_batch=True)
    assert isinstance(end, str)
    assert "into 3 ranks" in end
    assert run(monkeypatch, *words) == 0
    assert "num_samples" in capsys.readouterr().out


def command(*words: str, module: str = "trainer") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_1() -> None:
    done = command("+experiment=emoji", "optim.lrr=1")
    assert done.returncode == 1
    assert done.stderr == "error: optim.lrr is no option (did you mean optim.lr?)\n"


def test_a_training_shares_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "into 3 ranks" in command("+experiment=emoji", "--cfg=job").stderr


def crash(config: Config) -> None:
    raise RuntimeError("connection to rank 3 lost")


def test_a_crash_is_a_stack_trace_and_exit_code_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "+experiment=emoji", target=f"{__name__}:crash") == 70
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.endswith("RuntimeError: connection to rank 3 lost\n")


# ---- the doors
