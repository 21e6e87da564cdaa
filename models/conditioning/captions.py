"""Captions come from outside: bound them, and make them sound Unicode, before any tokenizer."""

import re

CHARACTERS_A_TOKEN = 8
"""Characters of a caption that are read for each token. A token of English has about five, with the
space."""
_SURROGATES = re.compile("[\ud800-\udfff]")


def bounded(caption: str, tokens: int) -> str:
    """Return a caption that any tokenizer takes, in a time that does not depend on its length.

    tokens: number of tokens that the network uses. White space of a longer caption counts as one
    character. Half of a surrogate pair, which no encoder accepts, becomes U+FFFD.
    """
    limit = tokens * CHARACTERS_A_TOKEN
    if len(caption) > limit:
        caption = " ".join(caption[: 8 * limit].split())[:limit]
    return _SURROGATES.sub("\ufffd", caption)
