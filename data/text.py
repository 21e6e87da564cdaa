"""Text from outside: captions, file names, keys of samples, values of options.

At the door, text that fails `is_unicode` is refused: half of a surrogate pair is valid in JSON, and
stands for a byte that is not UTF-8 in the name of a file. Where text is shown, `printable` cuts it,
and escapes the characters that move a terminal's cursor or change the order of letters.
"""

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
"""Unicode's categories Cc, Cf, Cs, Zl and Zp, except the joiners U+200C and U+200D of words and
emoji."""
MAX_SHOWN = 200
"""[characters] Longer names and captions are cut where they are shown."""


def is_unicode(text: str) -> bool:
    """Say whether UTF-8 can encode a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str, kept: str = "") -> str:
    """Escape control characters, directions of writing and halves of surrogate pairs.

    kept: control characters that stay, such as line feeds.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in kept else character.encode("unicode_escape").decode()

    return _UNPRINTABLE.sub(escape, text)


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a text from outside as it may be shown: escaped, on one line, of `limit` or less."""
    shown = escaped(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def words_of(class_name: str) -> str:
    """Return the name of a class as a caption: `golden_retriever` is "golden retriever"."""
    return class_name.replace("_", " ").strip()
