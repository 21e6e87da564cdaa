"""Names in a run folder."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.runs.paths import (
    CHECKPOINTS,
    checkpoints_in,
    newest_checkpoint,
    step_name,
    step_of,
    steps_in,
)

STEPS = st.integers(0, 10**8 - 1)


@given(STEPS)
def test_a_name_tells_its_step(step: int) -> None:
    for path in (Path(step_name(step)), Path("a", f"damaged_{step_name(step)}")):
        assert step_of(path) == step_of(path.with_suffix(".json")) == step


@settings(deadline=None)
@given(st.sets(STEPS, min_size=1, max_size=5))
def test_the_newest_checkpoint_has_the_last_step(steps: set[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        for step in steps:
            (run / CHECKPOINTS / step_name(step)).mkdir(parents=True)
        (run / CHECKPOINTS / f".{step_name(10**8 - 1)}").mkdir()
        (run / CHECKPOINTS / f"damaged_{step_name(10**8 - 1)}").mkdir()
        newest = newest_checkpoint(run)
        assert newest is not None
        assert step_of(newest) == max(steps)


NAMES = st.from_regex(r"(\._|damaged_|\.)?step_[0-9]{8}(_backup|\.txt|~| )?", fullmatch=True)
ODD = st.sampled_from(["step_5", "step_000000005", "step_٠٠٠٠٠٠٠٥", "step_", "notes"])


@settings(deadline=None, max_examples=200)
@given(st.sets(NAMES | ODD, max_size=8))
def test_only_whole_names_are_checkpoints(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, CHECKPOINTS)
        assert checkpoints_in(folder) == {}
        for one in names:
            (folder / one).mkdir(parents=True)
        whole = sorted(one for one in names if re.fullmatch("step_[0-9]{8}", one))
        assert [path.name for path in checkpoints_in(folder).values()] == whole


def test_a_link_to_a_folder_is_a_checkpoint_and_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / step_name(1)).symlink_to(tmp_path)
    (tmp_path / step_name(2)).symlink_to(tmp_path / "nowhere")
    (tmp_path / step_name(3)).touch()
    assert list(checkpoints_in(tmp_path)) == [1]
    assert list(steps_in(tmp_path)) == [1, 2, 3]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).touch()
    with pytest.raises(NotADirectoryError):
        newest_checkpoint(tmp_path)
