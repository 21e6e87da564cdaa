"""A secret in any option that takes text stays in memory: in no file, no record, no output."""

import json
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from tests.support.hidden import forget_hidden
from trainer.checks import explain
from trainer.cli import load_config
from trainer.config import Config
from trainer.config.outside import PROSE, texts
from trainer.options import paths
from trainer.runs.record import open_run, plain_config, public_config
from trainer.runtime.output import clean_output

CANARY = "S3cretCanary"
ITEMS = {
    "data.mixture": ["data.mixture=[{{latents:{0},weight:1,caption_field:{0}}}]"],
    "data.caption_fields": ["data.caption_fields=[{{name:{0}}}]"],
    "data.filters": ["data.filters=[{{name:{0},min:1}},{{name:x,allowed:[{0}]}}]"],
}
"""Options that are lists of sections, and the overrides that fill their texts."""


def overrides(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The path of every option that takes text, and an override with a place for it."""
    for name, hint in get_type_hints(kind).items():
        path = prefix + name
        if hint is str:
            yield path, f"{path}={{0}}"
        elif hint == list[str]:
            yield path, f"{path}=[{{0}}]"
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from overrides(hint, f"{path}.")
        elif any(map(is_dataclass, get_args(hint))):
            yield from ((path, override) for override in ITEMS[path])
        else:
            assert str not in (hint, *get_args(hint)), path


CLOSED = ("plan.gpu", "ema.use", "data.pixels.background", "data.encoding")
"""Options that take one of a few texts, and refuse any other."""
OPTIONS = {path: override for path, override in overrides() if path not in CLOSED}


def given(value: str, options: dict[str, str] = OPTIONS) -> list[str]:
    """An experiment with a text in each of these options."""
    base = ["+experiment=emoji", "eval.every=1000", "checkpoint.every=1000"]
    return base + [
        override.format(value.replace("{n}", str(n))) for n, override in enumerate(options.values())
    ]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_hidden(monkeypatch)
    for number in range(len(OPTIONS)):
        monkeypatch.setenv(f"LF_OPTION_{number}", f"{CANARY}{number}x")


@pytest.fixture
def config() -> Config:
    """Every text comes from the environment."""
    return load_config(given("${oc.env:LF_OPTION_{n}}"))


def test_every_option_that_takes_text_is_tried(config: Config) -> None:
    found = {path for path, text in texts(config) if CANARY in text}
    assert {path.partition("[")[0] for path in found} >= OPTIONS.keys()
    assert len(OPTIONS) > 25
    assert OPTIONS.keys() <= set(paths())


def test_values_from_the_environment_are_in_no_file(config: Config, tmp_path: Path) -> None:
    assert CANARY in json.dumps(plain_config(config))
    assert CANARY not in json.dumps(public_config(config))
    config.run.dir = str(tmp_path)
    folder = open_run(config, {})
    text = (folder / "config.yaml").read_text()
    assert CANARY not in text
    assert "${oc.env:LF_OPTION_0}" in text
    assert yaml.safe_load(text)["data"]["dir"].startswith("${oc.env:LF_OPTION_")


def test_values_from_the_environment_are_in_no_output(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with clean_output():
        for _, text in texts(config):
            print(text)
    said = capsys.readouterr()
    assert CANARY not in said.out
    assert "${oc.env:LF_OPTION_0}" in said.out
    for _, text in texts(config):
        for error in (ValueError(f"{text}: no"), OSError(2, "no file", text), KeyError(text)):
            assert CANARY not in explain(error)


@pytest.mark.parametrize(
    "url",
    [
        f"http://bob:{CANARY}@host/x",
        f"https://{CANARY}@host/x",
        f"s3://key:{CANARY}@bucket",
        f"https://host/x?X-Amz-Signature={CANARY}",
        f"https://host/x?sig={CANARY}&se=1",
    ],
)
def test_a_url_with_a_secret_is_refused_by_its_path(url: str) -> None:
    with pytest.raises(ValueError, match="a URL with a user name") as refused:
        load_config(given(f"'{url}'"))
    message = explain(refused.value)
    assert CANARY not in str(refused.value) + message
    for path in OPTIONS.keys() - set(PROSE):
        assert path in message, path
    prose = {path: OPTIONS[path] for path in PROSE}
    config = load_config(given(f"'{url}'", prose))
    assert CANARY not in json.dumps(public_config(config))


@pytest.mark.parametrize("token", [f"hf_{CANARY}abcdefgh", f"token={CANARY}", "ghp_" + 2 * CANARY])
def test_tokens_are_in_no_file(token: str) -> None:
    config = load_config(given(f"'{token}'"))
    assert token in json.dumps(plain_config(config))
    assert token not in json.dumps(public_config(config))


def test_a_default_of_a_missing_variable_is_no_secret() -> None:
    config = load_config(["+experiment=emoji", "data.dir=${oc.env:LF_NOT_SET,plain}/emoji"])
    assert public_config(config)["data"]["dir"] == "plain/emoji"


def test_a_name_with_nul_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run\.name holds the character NUL"):
        load_config(["+experiment=emoji", "run.name='a\0b'"])


@pytest.mark.parametrize("name", ["a\x85b", "\x1b[2J", "\u202eb", "\udcff"])
def test_a_run_that_no_log_can_show_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.name holds control characters"):
        load_config(["+experiment=emoji", f"run.name='{name}'"])


def test_an_override_that_cannot_be_read_hides_its_value() -> None:
    with pytest.raises(Exception, match=CANARY) as error:
        load_config(["+experiment=emoji", f"logger.wandb.key=({CANARY}"])
    assert isinstance(error.value, Exception)
    assert CANARY not in explain(error.value)
    assert "logger.wandb.key" in explain(error.value)


def test_any_text_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hostile: list[Any] = ["\x1b[2Jgone", "\udcff", "\u202etxt", "a\0b", types.SimpleNamespace(x=1)]
    with clean_output():
        print(*hostile, sep="\n")
        print("\x1b[A\x1b[A", end="")
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == ["\\x1b[2Jgone", "\\udcff", "\\u202etxt", "a\\x00b"]
    assert out.endswith("\x1b[A\x1b[A")
