"""What differs between a data set's origin and the present one is said by config path."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import secrets
from data.config import DataConfig, FilterConfig, SourceConfig, SourceKind
from tests.support.hidden import forget_hidden
from trainer.pack.origin import Origin


def origin(raw: str = "files", filters: list[FilterConfig] | None = None, **source: Any) -> Origin:
    given = SourceConfig(**source)
    return Origin.of(DataConfig(dir="x", image_size=8, source=given, filters=filters or []), raw)


def hash_of_0_1_0(one: Origin) -> str:
    return hashlib.sha256(json.dumps([*one.options.values(), one.former]).encode()).hexdigest()


RULE = FilterConfig(name="width", min=3.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (origin(shard_samples=7), "data.source.shard_samples was 7 and is 10000"),
        (origin(val_share=0.5), "data.source.val_share was 0.5 and is 0.0"),
        (origin(kind=SourceKind.openmoji), 'data.source.kind was "openmoji" and is "folder"'),
        (origin(require_captions=False), "data.source.require_captions was false and is true"),
        (origin(filters=[RULE]), 'data.filters was [{"name": "width", "min": 3.0, '),
        (origin(raw="more"), "other files at data.source.path"),
    ],
)
def test_a_difference_names_the_option_and_both_values(other: Origin, said: str) -> None:
    mine = origin()
    assert mine.differences(mine.text()) == ""
    assert mine.differences(other.text()).startswith(said)


def test_a_hash_of_0_1_0_still_tells_the_same_from_another() -> None:
    mine, other = origin(), origin(val_share=0.5)
    assert mine.differences(hash_of_0_1_0(mine)) == ""
    said = mine.differences(hash_of_0_1_0(other))
    assert said.startswith("one or more of data.source.kind, ")
    assert said.endswith("data.source.path")


def test_an_entry_of_an_earlier_version_is_the_same_without_the_state_of_its_tars() -> None:
    mine = dataclasses.replace(origin(), raw="places", former="places and sizes", files="state")
    earlier = origin(raw="places and sizes").text()
    assert mine.differences(earlier) == mine.differences(hash_of_0_1_0(mine)) == ""
    assert not mine.has_newer_files(earlier)
    assert not mine.has_newer_files(hash_of_0_1_0(mine))
    assert not mine.has_newer_files(mine.text())
    later = dataclasses.replace(mine, files="another state")
    assert later.differences(mine.text()) == ""
    assert later.has_newer_files(mine.text())


@settings(max_examples=200)
@given(text=st.text() | st.sampled_from(["[]", "null", "{}", '{"data.filters": 3}', "[" * 10**5]))
def test_any_text_in_a_manifest_is_a_difference(text: str) -> None:
    assert origin().differences(text)


def test_the_raw_files_are_told_by_a_hash_alone() -> None:
    secret = dataclasses.replace(origin(), raw="https://key@host/tars")
    assert "key" not in secret.text()


def test_a_hidden_value_is_not_kept_and_another_one_is_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_hidden(monkeypatch)
    before, after = (
        origin(filters=[FilterConfig(name="owner", allowed=[f"{word}owner"])])
        for word in ("first", "second")
    )
    secrets.hide("firstowner", "${oc.env:OWNER}")
    stored = before.text()
    assert "firstowner" not in stored
    assert before.differences(stored) == ""
    secrets.hide("secondowner", "${oc.env:OWNER}")
    assert after.differences(stored) == "a value from the environment in data.filters has changed"
