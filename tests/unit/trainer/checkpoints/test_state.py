"""state.json of a stranger: what cannot be right is one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import ROOT
from trainer.checkpoints.reader import (
    FORMAT_VERSION,
    STATE,
    encode_manifest,
    manifest_entry,
    open_checkpoint,
)
from trainer.checkpoints.state import parse_state
from trainer.runs.paths import MANIFEST

FIXTURE = ROOT / "tests" / "fixtures" / "run" / "checkpoints" / "step_00000003"
SOUND: dict[str, Any] = {
    "step": 2,
    "averages": ["decay_0.999"],
    "images_seen": 8,
    "task": {},
    "config": {},
    "updates": 2,
}


def write(path: Path, state: object) -> Path:
    """A checkpoint whose hashes fit."""
    path.mkdir(exist_ok=True)
    (path / STATE).write_text(state if isinstance(state, str) else json.dumps(state))
    entries = {"version": FORMAT_VERSION, "files": {STATE: manifest_entry(path / STATE)}}
    (path / MANIFEST).write_bytes(encode_manifest(entries))
    return path


def test_a_sound_state_is_read(tmp_path: Path) -> None:
    for name in ("step_00000002", "copied"):
        assert open_checkpoint(write(tmp_path / name, SOUND)).step == 2


def test_a_state_without_averages_has_none_to_show(tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "step_00000002", SOUND | {"averages": []}))
    with pytest.raises(ValueError, match="step_00000002 has no averages"):
        found.average("")


NONSENSE = {
    "list": [],
    "nested": "[" * 100_000,
    "text": "no JSON",
    "averages null": SOUND | {"averages": None},
    "averages of numbers": SOUND | {"averages": [1]},
    "step text": SOUND | {"step": "2"},
    "step null": SOUND | {"step": None},
    "step true": SOUND | {"step": True},
    "step negative": SOUND | {"step": -7},
    "step huge": SOUND | {"step": 10**15},
    "step of another folder": SOUND | {"step": 3},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "step_00000002", NONSENSE[kind])
    with pytest.raises(ValueError, match=r"step_00000002/state\.json") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


WITHIN = {
    "adam_steps": ["x", -1, True, None],
    "decoder.adam_steps": [[1]],
    "metrics": [{"a": None}, {"a": [1.0]}],
    "meter": [{"a": 1.0}, {"a": ["x"]}],
    "finite": [{"a": 0.5}, {"a": -1}],
    "unwritten": [{"metrics.jsonl": [1]}],
    "images_seen": [-1],
}


@pytest.mark.parametrize("entry", WITHIN)
def test_the_content_of_an_entry_is_of_its_type_too(entry: str) -> None:
    sound = json.loads((FIXTURE / STATE).read_text())
    parse_state(sound)
    for value in WITHIN[entry]:
        with pytest.raises(ValueError, match=f"in '{entry.split('.')[-1]}', or no such content$"):
            parse_state(sound | {entry: value})


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([*SOUND, "cursor", "quarantine", "adam_steps", "metrics", "meter"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=5,
        ),
    )
)
def test_any_object_is_a_state_or_a_value_error(changes: dict[str, Any]) -> None:
    for state in (changes, SOUND | changes):
        try:
            parse_state(state)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", [STATE, MANIFEST, "rank_00000_000.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_files_of_a_checkpoint_are_its_own(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / "step_00000002", SOUND)
    file = path / name
    outside = tmp_path / "outside"
    outside.write_bytes(file.read_bytes() if file.exists() else b"")
    if not file.exists():
        file.touch()
        files = {one: manifest_entry(path / one) for one in (STATE, name)}
        manifest = {"version": FORMAT_VERSION, "files": files}
        (path / MANIFEST).write_bytes(encode_manifest(manifest))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to(outside)
    with pytest.raises(ValueError, match="step_00000002"):
        open_checkpoint(path)
