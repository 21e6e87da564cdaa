"""Command lines in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest

from trainer import cli


def end_of(monkeypatch: pytest.MonkeyPatch, *words: str, **options: Any) -> object:
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
