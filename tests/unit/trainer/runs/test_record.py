"""The config and the versions in the run folder, with git and without."""

import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.paths import ROOT
from trainer.cli import load_config
from trainer.runs import record


def write_git(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)


def test_the_commit_is_that_of_git() -> None:
    words = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert record.versions()["commit"] == (told.stdout.strip() or "unknown")


@pytest.mark.parametrize("script", ["", "exit 128", "exec /bin/sleep 60", "echo abc; exit 1"])
def test_without_git_the_commit_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    """No git, no repository, a repository on a disk that hangs."""
    if script:
        write_git(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(record, "GIT_TIMEOUT_S", 0.5)
    found = record.versions()
    assert found["commit"] == "unknown"
    assert {"python", "torch"} <= found.keys()


@pytest.mark.parametrize("experiment", ["emoji", "laion_512", "emoji_autoencoder"])
def test_a_plain_config_is_that_of_omegaconf(experiment: str) -> None:
    words = [f"+experiment={experiment}", "data.filters=[{name: width, min: 1}]"]
    config = load_config([*words, "train.micro_batch_size=1"])
    tree = OmegaConf.structured(config)
    expected = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    assert record.plain_config(config) == expected
