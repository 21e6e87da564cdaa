"""Names of classes in prompts."""

from pathlib import Path

import pytest

from data.shards.account import Fate, LeftOut
from data.shards.manifest import Kind, Manifest
from trainer.runs.data_set import numbers_of, read_classes, read_data_set, write_data_set
from trainer.runs.paths import DATA

NAMES = ["tench", "golden_retriever", "café_au_lait"]


def test_names_and_numbers_are_classes() -> None:
    prompts = ["golden_retriever", "Golden Retriever", " 2 ", "CAFÉ au lait", "7"]
    assert numbers_of(prompts, NAMES) == ["1", "1", " 2 ", "2", "7"]


def test_a_misspelt_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(
        ValueError,
        match=r"^sample\.prompts: 'golden retreiver' is no class; did you mean golden retriever\? "
        "The classes are tench, golden retriever, café au lait$",
    ):
        numbers_of(["golden retreiver"], NAMES)
    with pytest.raises(ValueError, match=r"The classes are 0x, .*, 19x and 980 more$"):
        numbers_of(["nothing like it"], [f"{number}x" for number in range(1000)])


def test_without_names_prompts_stay() -> None:
    assert numbers_of(["a", "1"], []) == ["a", "1"]


def test_a_run_keeps_the_account_and_the_names(tmp_path: Path) -> None:
    assert read_classes(tmp_path) == []
    lost = LeftOut(fate=Fate.rejected, reason="no caption", count=3, examples=["a", "\udcff"])
    manifest = Manifest(kind=Kind.images, shards=[], classes=NAMES, left_out=[lost], noted={"x": 2})
    write_data_set(tmp_path, manifest.facts)
    assert read_classes(tmp_path) == NAMES
    found = read_data_set(tmp_path)
    assert (found["found"], found["samples"], found["noted"]) == (3, 0, {"x": 2})
    assert found["left_out"][0]["reason"] == "no caption"
    for text in ('{"classes": 3}', "[]"):
        (tmp_path / DATA).write_text(text)
        with pytest.raises(ValueError, match=r"data\.json: "):
            read_classes(tmp_path)
