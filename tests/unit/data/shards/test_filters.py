"""Filters: what each rule keeps and drops, from whichever place a field comes."""

import json
import math
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data.config import FilterConfig, Missing
from data.shards import filters
from data.shards.codecs import BadSampleError
from data.shards.metadata import Rows, SampleFields, read_download_counts
from data.storage.documents import lookup
from tests.support.data_sets import png
from trainer.cli import load_config

numbers = st.floats(allow_nan=False, allow_infinity=False)
SCORE = [FilterConfig(name="score", max=1)]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (5, True),
        (7.0, True),
        ("5.5", True),
        (Decimal("5.25"), True),
        (b"6", True),
        (4.999, False),
        (8, False),
        (Decimal("4.99"), False),
        ("", False),
        (None, False),
        (math.nan, False),
        (Decimal("NaN"), False),
        (True, False),
        ([], False),
        (math.inf, False),
    ],
)
def test_a_range_keeps_numbers_within_it(value: object, kept: bool) -> None:
    assert filters.keeps(FilterConfig(name="x", min=5, max=7), value) is kept


def test_bounds_are_optional_and_true_is_one() -> None:
    assert filters.keeps(FilterConfig(name="x", min=1), True)
    assert not filters.keeps(FilterConfig(name="x", min=1), False)
    assert filters.keeps(FilterConfig(name="x", max=1), -math.inf)
    assert filters.keeps(FilterConfig(name="x", min=1), 10**400)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("en", True),
        ("EN", False),
        ("", False),
        (3, True),
        (3.0, True),
        (3.5, False),
        (Decimal("3.00"), True),
        (b"en", True),
        (date(2024, 2, 1), True),
        (datetime(2024, 2, 1, 12), False),
        (None, False),
        (True, True),
        (False, False),
        (math.nan, False),
    ],
)
def test_allowed_keeps_the_values_that_it_names(value: object, kept: bool) -> None:
    rule = FilterConfig(name="x", allowed=["en", "3", "true", "2024-02-01"])
    assert filters.keeps(rule, value) is kept


@pytest.mark.parametrize("absent", [None, math.nan, Decimal("NaN"), [], {}, "", b""])
def test_a_missing_field_is_kept_where_the_rule_says_so(absent: object) -> None:
    assert filters.keeps(FilterConfig(name="x", max=1, missing=Missing.keep), absent)
    assert filters.keeps(FilterConfig(name="x", allowed=["a"], missing=Missing.keep), absent)
    assert not filters.keeps(FilterConfig(name="x", max=1), absent)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        ("UNSURE", "text"),
        (b"\xff", "text"),
        ("nan", "text"),
        ([0.1], "a list"),
        ({"a": 0.1}, "an object"),
        (datetime(2024, 2, 1), "a datetime"),
    ],
)
@pytest.mark.parametrize("missing", Missing)
def test_what_cannot_be_compared_is_neither_kept_nor_dropped(
    value: object, type_: str, missing: Missing
) -> None:
    with pytest.raises(BadSampleError, match=f"^x is {type_}, no number to compare$"):
        filters.keeps(FilterConfig(name="x", max=0.5, missing=missing), value)
    if not isinstance(value, str | bytes | date):
        with pytest.raises(BadSampleError, match=f"^x is {type_}, no text to find in `allowed`$"):
            filters.keeps(FilterConfig(name="x", allowed=["a"], missing=missing), value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.decimals(),
    st.datetimes(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)


@settings(max_examples=500)
@given(VALUES, st.floats(-1e9, 1e9), st.sampled_from(Missing))
def test_any_value_is_kept_dropped_or_named(value: object, bound: float, missing: Missing) -> None:
    rule = FilterConfig(name="x", max=bound, missing=missing)
    try:
        kept = filters.keeps(rule, value)
    except BadSampleError:
        assert filters.as_number(value) is None
        return
    number = filters.as_number(value)
    assert kept is ((missing is Missing.keep) if number is None else number <= bound)


def test_rules_read_as_words() -> None:
    def words(**options: Any) -> str:
        return filters.rule_text(FilterConfig(name="x", **options))

    assert words(min=512) == "x >= 512"
    assert words(max=0.25) == "x <= 0.25"
    assert words(min=-1, max=1234567) == "-1 <= x <= 1234567"
    assert words(allowed=["en", "de"], missing=Missing.keep) == "x in [en, de] or missing"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(numbers, numbers), max_size=4),
    st.lists(st.lists(st.none() | numbers, min_size=4, max_size=4), max_size=20),
)
def test_every_sample_counts_once_for_the_first_rule_that_drops_it(
    bounds: list[tuple[float, float]], samples: list[list[float | None]]
) -> None:
    rules = [
        FilterConfig(name=str(number), min=min(pair), max=max(pair))
        for number, pair in enumerate(bounds)
    ]
    dropped, kept = [0] * len(rules), 0
    for sample in samples:
        rule = filters.first_to_drop(rules, lambda name, sample=sample: sample[int(name)])
        if rule is None:
            kept += 1
        else:
            dropped[rule] += 1
    counts = filters.count(rules, dropped, kept)
    left = samples
    for number, (count, (low, high)) in enumerate(zip(counts, map(sorted, bounds), strict=True)):
        passing = [s for s in left if (v := s[number]) is not None and low <= v <= high]
        assert (count.kept, count.dropped) == (len(passing), len(left) - len(passing))
        left = passing
    assert kept == len(left)


def test_fields_are_found_by_name_and_by_path() -> None:
    fields = {"a": {"b": {"c": 1}, "b.c": 2}, "a.b": 3, "d": [4]}
    assert lookup(fields, "a.b") == 3
    assert lookup({"a": fields["a"]}, "a.b.c") == 2
    assert lookup({"a": {"b": {"c": 1}}}, "a.b.c") == 1
    assert lookup(fields, "d.0") is lookup(fields, "x") is lookup(fields, "d.e") is None


def fields_of(row: Mapping[str, Any] | None = None, **members: bytes) -> SampleFields:
    return SampleFields(row or {}, members.get)


def test_the_row_goes_before_the_json_and_that_before_what_is_derived() -> None:
    members = {
        "png": png(0, size=9),
        "txt": " ein Café ".encode(),
        "json": json.dumps({"width": 40, "x": 1, "score": None, "deep": {"er": "z"}}).encode(),
    }
    fields = fields_of({"x": 2, "width": None}, **members)
    assert (fields("x"), fields("width"), fields("height")) == (2, 40, 9)
    assert fields("aspect") == pytest.approx(40 / 9)
    assert fields("caption_length") == len("ein Café")
    assert fields("deep.er") == "z"
    assert fields("score") is fields("other") is None


def test_a_side_of_zero_has_no_aspect() -> None:
    fields = fields_of(json=b'{"width": 0, "height": 5}')
    assert filters.as_number(fields("aspect")) is None


@pytest.mark.parametrize(
    ("members", "name", "reason"),
    [
        ({"json": b"[" * 100_000}, "x", "JSON cannot be read"),
        ({"json": b"[1]"}, "x", "JSON is not an object"),
        ({"json": b'{"x": ' * 40 + b"1" + b"}" * 40}, "x", "JSON is nested deeper"),
        ({"png": b"no image"}, "width", "image cannot be decoded"),
        ({"txt": b"a" * 2**17}, "caption_length", "text of 131072 bytes is over"),
    ],
)
def test_what_cannot_be_read_is_a_bad_sample(
    members: dict[str, bytes], name: str, reason: str
) -> None:
    with pytest.raises(BadSampleError, match=reason):
        fields_of(None, **members)(name)


def test_a_row_that_answers_spares_the_json() -> None:
    assert fields_of({"x": 1}, json=b"damaged")("x") == 1


def test_rows_are_joined_by_key_with_the_columns_that_are_needed(tmp_path: Path) -> None:
    table = pa.table(
        {"key": ["a", "b"], "score": [1.5, None], "deep": [{"er": 1}, None], "other": [0, 0]}
    )
    parquet.write_table(table, tmp_path / "0.parquet")
    rules = [FilterConfig(name=name, max=1) for name in ("score", "deep.er", "width")]
    rows = Rows.beside(str(tmp_path / "0.tar"), rules)
    assert rows.rows == {
        "a": {"key": "a", "score": 1.5, "deep": {"er": 1}},
        "b": {"key": "b", "score": None, "deep": None},
    }
    assert fields_of(rows.of("a"))("deep.er") == 1
    assert rows.of("c") == Rows.beside(str(tmp_path / "1.tar"), rules).of("a") == {}


@pytest.mark.parametrize(
    "keys", [pa.array([7, 12]), pa.array(["007", "012"]), pa.array([b"007", b"012"])]
)
def test_keys_join_by_number_text_and_bytes(tmp_path: Path, keys: Any) -> None:
    parquet.write_table(pa.table({"key": keys, "score": [0.5, 1.5]}), tmp_path / "0.parquet")
    rows = Rows.beside(str(tmp_path / "0.tar"), SCORE)
    rows.check(np.array([b"007", b"012", b"013"]))
    assert [rows.of(key).get("score") for key in ("007", "012", "013")] == [0.5, 1.5, None]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x", "y"], r"no 'key' in it, such as x, names a sample of the tar, such as 07"),
        ([7, 8], r"two samples of the tar have the same number with other zeros"),
        ([7.0, 8.0], r"column 'key' holds float"),
        ([None, None], r"column 'key' holds NoneType"),
    ],
)
def test_keys_that_join_nothing_or_two_are_named(
    tmp_path: Path, keys: list[Any], message: str
) -> None:
    parquet.write_table(pa.table({"key": keys, "score": [0.5, 1.5]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=rf"0\.parquet: .*{message}"):
        Rows.beside(str(tmp_path / "0.tar"), SCORE).check(np.array([b"07", b"007"]))


def test_a_table_that_cannot_be_joined_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"score": [1.5]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet: no column 'key'"):
        Rows.beside(str(tmp_path / "0.tar"), SCORE)
    whole = (tmp_path / "0.parquet").read_bytes()
    for damaged in (b"", b"nonsense" * 9, whole[:-20], whole[:8] + bytes(len(whole) - 8)):
        (tmp_path / "0.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0\.parquet: cannot be read as parquet \([^\n]+$"):
            Rows.beside(str(tmp_path / "0.tar"), SCORE)


def test_download_counts_are_whole_numbers(tmp_path: Path) -> None:
    assert read_download_counts(str(tmp_path / "0.tar")) == {}
    stats = {"count": 9, "successes": 7, "failed_to_download": 2.0, "duration": 1.5, "x": 4}
    (tmp_path / "0_stats.json").write_text(json.dumps(stats))
    assert read_download_counts(str(tmp_path / "0.tar")) == {"count": 9, "successes": 7}
    for damaged in ("", "[1]", "[" * 10_000):
        (tmp_path / "0_stats.json").write_text(damaged)
        with pytest.raises(BadSampleError):
            read_download_counts(str(tmp_path / "0.tar"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{name: x}]", r"data.filters\[0\] \(x\) needs either min, max or both, or allowed"),
        ("[{name: x, min: 1}, {name: y, min: 1, allowed: [a]}]", r"data.filters\[1\] \(y\) needs"),
        ("[{name: x, max: 1}, {name: y, min: 2, max: 1}]", r"data.filters\[1\] \(y\): min=2.0 is"),
    ],
)
def test_rules_that_make_no_sense_are_named(rules: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["+experiment=emoji", f"data.filters={rules}"])


def test_rules_come_from_the_config() -> None:
    rules = "[{name: deep.er, min: 1, max: 2}, {name: l, allowed: [en, 3], missing: keep}]"
    found = load_config(["+experiment=emoji", f"data.filters={rules}"]).data.filters
    assert found[0] == FilterConfig(name="deep.er", min=1, max=2)
    assert found[1] == FilterConfig(name="l", allowed=["en", "3"], missing=Missing.keep)
