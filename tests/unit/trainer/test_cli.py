"""The way in: Hydra's switches in every spelling, sweeps, exit codes, and the doors of commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import end_of
from tests.support.paths import ROOT
from trainer import cli
from trainer.config import Config

CONTRADICTION = ["+experiment=emoji", "data.lanes=5"]
REFUSED = "error: data.lanes=5 does not divide train.global_batch_size=32"


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
    assert end_of(monkeypatch, first, second, *switches.split()) == REFUSED
    assert capsys.readouterr() == ("", "")


def test_switches_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = CONTRADICTION
    assert end_of(monkeypatch, "--cfg=job", first, second) == REFUSED
    assert end_of(monkeypatch, first, "--cfg", "job", second, "-p", "train") == REFUSED
    assert end_of(monkeypatch, "-cjob", first, "--resolve", second) == REFUSED


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
    assert end_of(monkeypatch, *words, "train.log_every=3") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# @package train\nmax_steps: 7\n")
    assert "log_every: 3\n" in printed
    wrong = end_of(monkeypatch, *words, "train.log_every=3", "data.lanes=5")
    assert wrong == "error: data.lanes=5 does not divide train.global_batch_size=32"


def test_a_config_of_ones_own_needs_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    words = ["-cd", str(tmp_path), "-cn", "own", "-cjob", "-prun", "run.name=here"]
    own.write_text("defaults: [experiment: emoji]\n")
    for switches in (words, [word for word in words if word not in ("-cjob", "-prun")]):
        assert end_of(monkeypatch, *switches) == (
            "error: this config lacks its schema: begin its defaults with `- config`"
        )
    assert list(tmp_path.iterdir()) == [own]
    own.write_text("defaults: [config, experiment: emoji, _self_]\n")
    assert end_of(monkeypatch, *words) == 0
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
    end = end_of(monkeypatch, "+experiment=emoji", *words)
    assert isinstance(end, str)
    assert end.startswith(f"error: {line}")
    assert "\n" not in end
    assert capsys.readouterr() == ("", "")


def test_switches_of_hydra_stay_hydras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(monkeypatch, "--hydra-help") == 0
    assert "Hydra (" in capsys.readouterr().out
    assert end_of(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("Hydra 1.3")


@pytest.mark.parametrize("switch", ["-m", "--multi", "-rm", "hydra.mode=MULTIRUN"])
def test_a_command_that_cannot_sweep_trains_no_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, switch: str
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(cli, "_load", lambda target: trained.append)
    words = ["+experiment=emoji", "optim.lr=1,2", f"run.dir={tmp_path / 'run'}"]
    end = end_of(monkeypatch, switch, *words)
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
    end = end_of(monkeypatch, "+experiment=emoji", *word.split(), **sweep)
    assert str(end).startswith(f"error: {line}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["data.flip=2", "++data.flip=-1", "data.flip=1,2"])
def test_a_number_is_neither_true_nor_false(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    switch = ["-m"] if "," in word else []
    end = end_of(monkeypatch, *switch, "+experiment=emoji", word, point="a:b", summary="a:b")
    assert end == f"error: data.flip: {word[-2:].strip(',=')} is no value; it must be true or false"


def test_the_batch_must_divide_among_the_launched_ranks_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ("+experiment=emoji", "--cfg=job")
    end = end_of(monkeypatch, *words, shares_batch=True)
    assert isinstance(end, str)
    assert "into 3 ranks" in end
    assert end_of(monkeypatch, *words) == 0
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
    assert end_of(monkeypatch, "+experiment=emoji", target=f"{__name__}:crash") == 70
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.endswith("RuntimeError: connection to rank 3 lost\n")


# ---- the doors
