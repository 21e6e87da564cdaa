"""One function hides secrets in everything that is written or printed."""

import json
from collections.abc import Generator
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import secrets
from data.secrets import has_credentials, hide, hide_environment, public, redact, restore

CANARY = "S3cret0Canary"
WORDS = st.text(st.characters(codec="utf-8", exclude_characters=" \t\n\r\"'<>@/?#&;="), max_size=40)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """What a test hides is forgotten at its end."""
    monkeypatch.setattr(secrets, "_hidden", {})
    monkeypatch.setattr(secrets, "_values", {})
    yield


@pytest.mark.parametrize(
    "text",
    [
        f"http://bob:{CANARY}@host/latents",
        f"http://{CANARY}@host",
        f"s3://key:{CANARY}/more@bucket/a",
        f"https://host/x?X-Amz-Signature={CANARY}&x=1",
        f"https://host/x?sig={CANARY}",
        f"https://host/x?{CANARY}",
        f"https://host/x#access_token={CANARY}",
        f"two: http://a:b@c and ftp://d:{CANARY}@e,",
        f"'https://bob:{CANARY}@host:8080/a b'",
        f"--api-key={CANARY}",
        f"logger.wandb.api_key={CANARY}",
        f'{{"token": "{CANARY}"}}',
        f"password={CANARY}",
        f"Authorization: Bearer {CANARY}",
        f"hf_{CANARY}abcdefgh",
        f"ghp_{CANARY}{CANARY}",
    ],
)
def test_secrets_are_known_by_their_place_or_form(text: str) -> None:
    assert CANARY not in redact(text)
    assert "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/user/repo@main/x.tar",
        "https://host:9000/bucket@x/0000.tar",
        "s3://bucket/{0000..0123}.tar",
        "77 tokens, num_tokens=77, tokenizer=x",
        "write to a@b.org about https://openmoji.org",
        "a secret: the password of a cat",
        "runs/emoji/demo?x=1",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text
    assert not has_credentials(text)


@given(WORDS, WORDS.filter(lambda word: len(word) > 3), WORDS)
@settings(max_examples=300)
def test_no_url_keeps_its_user_its_password_or_its_query(a: str, b: str, c: str) -> None:
    for url in (f"https://{a}:{b}x@h/{c}", f"https://h/{a}?{c}={b}x&y=z"):
        assert has_credentials(url)
        clean = redact(url)
        if f"{b}x" not in f"https://***@h/{a}?{c}=***&y=***://h/{c}":
            assert f"{b}x" not in clean


@given(st.text(st.characters(categories=None), min_size=10, max_size=60))
@settings(max_examples=300)
def test_a_hidden_value_is_found_in_its_usual_spellings(value: str) -> None:
    secrets._hidden.clear()
    hide(value, "${oc.env:NAME}")
    for text in (value, repr(value), json.dumps(value), f"a{value}b"):
        assert value not in redact(text).replace("${oc.env:NAME}", "")
    if value.isascii() and value.strip() == value and value.isprintable():
        assert redact(quote(value)) == "${oc.env:NAME}"


def test_short_values_and_numbers_are_no_secrets() -> None:
    for value in ("a", "cat", "19", "0.0001", "1e-4", ""):
        hide(value, "hidden")
        assert redact(f"a cat 19 0.0001 1e-4 {value}") == f"a cat 19 0.0001 1e-4 {value}"
    hide("demo", "hidden")
    assert redact("runs/demo and demolition") == "runs/hidden and demolition"


def test_variables_with_the_names_of_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("MY_HOME", "/home/of/bob")
    hide_environment()
    assert redact(f"entity={CANARY} in /home/of/bob") == (
        "entity=${oc.env:WANDB_API_KEY} in /home/of/bob"
    )


def test_only_values_of_this_process_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_SECRET", CANARY)
    hide("/scratch/bob", "${oc.env:SCRATCH}")
    base = redact("/scratch/bob/tars")
    assert base == "${oc.env:SCRATCH}/tars"
    assert restore(base) == "/scratch/bob/tars"
    assert restore("${oc.env:OTHER_SECRET}/tars") == "${oc.env:OTHER_SECRET}/tars"


def test_json_is_public_down_to_its_leaves() -> None:
    tree = {"a": [f"http://b:{CANARY}@c", 1, None], f"token={CANARY}": {"b": "\x1b[2J\udcff"}}
    assert CANARY not in json.dumps(public(tree))
    assert public(tree)["a"] == ["http://***@c", 1, None]
    assert public({"b": "\x1b[2J\udcff"}) == {"b": "\\x1b[2J\\udcff"}


@pytest.mark.parametrize("text", ["://" * 20_000, "a." * 30_000, "eyJ-" * 20_000, "?" * 60_000])
def test_hostile_text_takes_no_long_time(text: str) -> None:
    assert len(redact(text)) >= len(text) - 3
