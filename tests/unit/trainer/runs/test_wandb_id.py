"""Each run has an id of its own in W&B, whatever happens to its folder."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import secrets
from tests.support.hidden import forget_hidden
from trainer.runs.wandb_id import wandb_id


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def test_every_start_in_a_folder_has_the_same_id_and_another_folder_another(
    tmp_path: Path,
) -> None:
    first = wandb_id(tmp_path / "a")
    assert wandb_id(tmp_path / "a") == first
    assert wandb_id(tmp_path / "b") != first


def test_a_run_begun_anew_has_a_new_id(tmp_path: Path) -> None:
    first = wandb_id(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert wandb_id(tmp_path / "a") != first


def test_a_copy_has_a_new_id_and_a_moved_folder_its_own(tmp_path: Path) -> None:
    first = wandb_id(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copy = wandb_id(tmp_path / "copy", saved=first)
    assert copy != first
    assert wandb_id(tmp_path / "copy", saved=first) == copy
    assert wandb_id(tmp_path / "a") == first
    (tmp_path / "a").rename(tmp_path / "moved")
    assert wandb_id(tmp_path / "moved") == first
    assert wandb_id(tmp_path / "a") != first


def test_the_name_of_a_hidden_folder_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_hidden(monkeypatch)
    secrets.hide(str(tmp_path), "${oc.env:PLACE}")
    first = wandb_id(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert str(tmp_path) not in (tmp_path / "a" / "wandb_id.json").read_text()
    assert wandb_id(tmp_path / "copy", saved=first) != first
    assert wandb_id(tmp_path / "a") == first


def test_a_run_whose_id_is_in_its_checkpoint_alone_keeps_it(tmp_path: Path) -> None:
    assert wandb_id(tmp_path, saved="old") == wandb_id(tmp_path) == "old"


def test_the_variable_wins_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_id(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert wandb_id(tmp_path) == "mine"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_id(tmp_path) == "mine"


@settings(max_examples=200, deadline=None)
@given(
    st.binary()
    | st.fixed_dictionaries({"id": st.text(), "folder": st.text() | st.none()}).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_a_file_of_any_bytes_gives_a_sound_id(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wandb_id.json").write_bytes(content)
        found = wandb_id(folder)
        assert found
        assert found.isascii()
        assert not set(found) & set("/\\#?%: ")
        assert wandb_id(folder) == found
