"""The progress of runs and references, which job scripts compare from start to start."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from trainer.runs.paths import CHECKPOINTS, step_name
from trainer.runs.progress import progress

NAMES = st.text(
    st.characters(exclude_characters="/$\\", exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]),
    min_size=1,
    max_size=60,
).filter(lambda name: name.strip(".") and len(name.encode()) < 200)
"""Names of folders. `$` and backslashes have a meaning in interpolations; a run has no others."""


@given(NAMES)
@settings(max_examples=200, deadline=None)
def test_a_new_checkpoint_is_seen_whatever_the_run_folder_is_called(name: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        run = Path(base, name)
        section = OmegaConf.to_yaml({"experiment": "emoji", "dir": str(run), "seed": 0})
        places = [progress(section)]
        for step in (20, 40):
            (run / CHECKPOINTS / step_name(step)).mkdir(parents=True)
            places.append(progress(section))
    assert len(set(places)) == 3
    assert all(len(place.splitlines()) == 1 for place in places)
    assert places[0].startswith("the start of ")
    assert places[2].endswith(step_name(40))


@pytest.mark.parametrize("name", ["2024", "a: b", "x # y", "%j", "it's", "- a", "true", "1e3"])
def test_a_name_that_yaml_quotes_is_read_as_text(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    section = OmegaConf.to_yaml({"dir": str(folder)})
    assert progress(section) == f"the start of {folder}"
    assert progress(OmegaConf.to_yaml({"dir": name})) == f"the start of {name}"


def test_a_folder_from_the_environment_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_OF_A_SITE", str(tmp_path))
    (tmp_path / "run" / CHECKPOINTS / step_name(7)).mkdir(parents=True)
    assert progress("dir: ${oc.env:SCRATCH_OF_A_SITE}/run").endswith(step_name(7))


def test_references_get_further_with_each_new_file(tmp_path: Path) -> None:
    section = OmegaConf.to_yaml({"every": 0, "references": str(tmp_path / "references")})
    places = [progress(section)]
    for name in ("a", "b\udcff"):
        (tmp_path / "references" / name).mkdir(parents=True)
        (tmp_path / "references" / name / f"{name}.npy").touch()
        places.append(progress(section))
    assert len(set(places)) == 3


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no run\.dir"):
        progress("optim: {}")
