"""Text from outside: what UTF-8 can encode, and what may be shown."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.text import MAX_SHOWN, escaped, is_unicode, printable

ANY_TEXT = st.text(st.characters(categories=None), max_size=300)
"""Halves of surrogate pairs, too, which `st.text()` leaves out."""


def moves_or_turns(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def test_the_characters_that_are_escaped_are_those_of_unicodes_categories() -> None:
    characters = map(chr, range(sys.maxunicode + 1))
    shown = [c for c in characters if moves_or_turns(c) and escaped(c) == c]
    assert shown == []
    for plain in ("a b", "é", "猫", "👩\u200d🚒", "میو\u200cه", "\u00a0"):
        assert escaped(plain) == plain


@given(ANY_TEXT)
@settings(max_examples=300)
def test_any_text_is_shown_on_one_short_line(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= MAX_SHOWN
    assert not any(map(moves_or_turns, shown))
    assert is_unicode(shown)
    if len(text) <= MAX_SHOWN and not any(map(moves_or_turns, text)):
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\0", "a\\nb\\x00"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff.png", "\\udcff.png"),
    ],
)
def test_control_characters_are_seen(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_megabyte_is_cut() -> None:
    assert printable("x" * 2**20) == "x" * (MAX_SHOWN - 1) + "…"
    assert escaped("a\nb", "\n") == "a\nb"
