"""Documents of strangers: bounded in size and depth, and one kind of error for all others."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import documents
from data.storage.documents import DocumentError, parse_json, parse_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)
)


@settings(max_examples=200)
@given(VALUES)
def test_documents_are_read_as_they_were_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(memoryview(json.dumps(value).encode())) == value


@settings(max_examples=200)
@given(st.text(alphabet="[]{}:,-&*!|>'\"\n 0aé%@`#?", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_document_or_one_kind_of_error(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(text)
        except DocumentError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a 1\nb: *a\n",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!python/object/apply:os.getcwd []",
        "[" * 10_000,
        "a: 9\n" * 2**15,
        "\0",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse_yaml(text)


def test_a_config_is_read() -> None:
    plain = {"run": {"name": "a: b", "seed": 3}, "lr": 1e-4, "empty": None, "list": ["x", True]}
    assert parse_yaml(yaml.safe_dump(plain)) == plain


def test_json_is_bounded_in_size_and_depth() -> None:
    deepest = '{"a":' * documents.MAX_JSON_DEPTH + "1" + "}" * documents.MAX_JSON_DEPTH
    assert parse_json(deepest)
    for payload in (f"[{deepest}]", "[" * 100_000, "9" * 10_000, '"' + "a" * 2**20 + '"'):
        with pytest.raises(DocumentError):
            parse_json(payload)
    assert len(parse_json('"' + "a" * 2**20 + '"', limit=2**21)) == 2**20
