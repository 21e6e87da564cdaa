"""Each command answers --help, typos and wrong numbers before it imports anything heavy."""

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.paths import ROOT
from trainer import cli
from trainer.cli import load_config
from trainer.multirun import combine
from trainer.options import help_text, sections

COMPOSED = sorted(
    ".".join(path.relative_to(ROOT).parts[:-1])
    for path in (ROOT / "trainer").rglob("__main__.py")
    if path.parent.name != "report"
)
"""Commands that take a config; trainer.report takes folders."""


OPEN_ALL = """
import contextlib, io, json, runpy, sys
modules, words = json.loads(sys.argv[1])
heavy = {"torch", "deepspeed", "webdataset", "wandb", "numpy", "matplotlib", "transformers"}
for module in modules:
    sys.argv = ["x", *words]
    said, code = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([module, code, said.getvalue(), sorted(heavy & set(sys.modules))]))
"""
Answers = Mapping[str, tuple[Any, str, list[str]]]
"""Command → exit code, what was printed, heavy packages imported until then."""


def open_all(modules: list[str], *words: str) -> Answers:
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, json.dumps([modules, words])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {module: (code, said, heavy) for module, code, said, heavy in rows}


@pytest.fixture(scope="module")
def helps() -> Answers:
    return open_all(COMPOSED, "--help")


@pytest.fixture(scope="module")
def mistakes() -> Answers:
    return open_all(COMPOSED, "+experiment=emoji", "optim.lrr=1")


@pytest.fixture(scope="module")
def outside() -> Answers:
    return open_all(COMPOSED, "+experiment=emoji", "optim.lr=nan")


@pytest.mark.parametrize("module", COMPOSED)
def test_help_answers_before_anything_heavy_is_imported(helps: Answers, module: str) -> None:
    code, said, heavy = helps[module]
    assert code == 0
    assert f"python -m {module} +experiment=" in said
    assert "docs/options.md" in said
    assert heavy == []


@pytest.mark.parametrize("module", COMPOSED)
def test_a_typo_answers_before_anything_heavy_is_imported(mistakes: Answers, module: str) -> None:
    code, _, heavy = mistakes[module]
    assert code.startswith("error: optim.lrr is no option")
    assert heavy == []


@pytest.mark.parametrize("module", COMPOSED)
def test_every_command_checks_the_domains(module: str, outside: Answers) -> None:
    code, _, heavy = outside[module]
    assert code == "error: optim.lr=nan must be a number > 0 and ≤ 1000"
    assert heavy == []


def test_the_report_helps_before_anything_heavy_is_imported() -> None:
    ((code, said, heavy),) = open_all(["trainer.report"], "--help").values()
    assert code == 0
    assert "RUN_FOLDER" in said
    assert heavy == []


def door(monkeypatch: pytest.MonkeyPatch, module: str) -> Mapping[str, Any]:
    """What a command's `__main__.py` hands to the way in."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli, "main", lambda target, **rest: given.update(rest, target=target))
    monkeypatch.setattr("signal.pthread_sigmask", lambda *mask: None)
    runpy.run_module(module, run_name="__main__")
    return given


@pytest.mark.parametrize("module", COMPOSED)
def test_help_shows_the_options_of_the_command(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    given = door(monkeypatch, module)
    text = help_text(given["about"], given["options"].split(), 80)
    assert text.startswith(given["about"].strip())
    below = text.removeprefix(given["about"].strip()).splitlines()
    assert max(map(len, below)) <= 80
    for name in given["options"].split():
        assert f"  {name}" in text or f"\n{name}: " in text


@pytest.mark.parametrize("module", COMPOSED)
def test_examples_of_the_help_compose(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    about = door(monkeypatch, module)["about"]
    examples = [line.strip() for line in about.splitlines() if line.startswith("    ")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition("  #")[0])
        assert module in words
        for _, overrides in combine([word for word in words if "=" in word and word[0] != "-"]):
            load_config(overrides)


def test_every_option_belongs_to_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {name for module in COMPOSED for name in door(monkeypatch, module)["options"].split()}
    lost = [
        option.path
        for section in sections()
        for option in section.options
        if section.path not in shown and option.path not in shown
    ]
    assert lost == []


def test_jobs_import_libraries_of_one_kind_of_model_where_they_use_them() -> None:
    jobs = ("evaluate.job", "export.job", "precompute.job", "sample.job", "train.loop")
    code = (
        f"import sys; import {', '.join(f'trainer.{job}' for job in jobs)};"
        "print(sorted({'open_clip', 'transformers', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
