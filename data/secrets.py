"""Keep secrets out of everything that is written or printed: they live in memory alone.

`redact` is the one function that does it. It hides

- user names, passwords, queries and fragments of URLs,
- tokens by their form, and values after names such as `password=`,
- values that `hide` has been told of: those of environment variables that a config names
  (`${oc.env:NAME}`), and of variables that are called a key, token, secret or password.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

from data.text import escaped

HIDDEN = "***"
SHORTEST = 4
"""[characters] Shorter values are no secrets: they stand in other words by chance."""
WORD = 8
"""[characters] A shorter value is hidden only where it stands alone."""

_END = r" \t\r\n\"'<>"
# bounded repetitions, because a text from outside can begin a URL at every character
_USER = re.compile(
    rf"(?<=://)(?:[^{_END}/?#@:]{{0,256}}:(?!\d+/)[^{_END}@]{{0,512}}|[^{_END}/?#@]{{0,512}})(?=@)"
)
_QUERY = re.compile(rf"(?<=://)([^{_END}?#]{{0,1024}})([?#][^{_END}]*)")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#]*)=[^&;#]*|(?<=[?#])[^=&;#]+(?=$|[&;#])")
_NAMES = r"password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|signature|credential|sig"
_ASSIGNED = re.compile(
    rf"(?i)\b((?:[\w.-]{{0,64}}[_.-])?(?:{_NAMES}))(=|[\"']\s*:\s*[\"'])([^\s\"'&,;\]}}]+)"
)
_TOKENS = re.compile(
    r"\b(?:hf_\w{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,2048}\.[\w-]{1,2048}\.[\w-]+"
    r"|(?<=Bearer )[\w.~+/=-]{8,}|(?<=Basic )[\w+/=]{8,})"
)
_VARIABLES = re.compile(r"(?i)(?:^|_)(?:(?:api)?key|token|secret|passwd|password)$")

_hidden: dict[str, str] = {}
"""Spelling of a secret value → the text that is shown instead."""
_values: dict[str, str] = {}
"""Text that is shown → the secret value."""


def hide(value: str, instead: str) -> None:
    """Let `redact` replace a value, in its usual spellings, by another text.

    Short values, and plain numbers below ten digits, are no secrets.
    """
    _values[instead] = value
    for line in {value, *value.splitlines()}:
        if len(line) >= SHORTEST and not _is_number(line) and line not in instead:
            in_urls = [quote(line, safe, errors="replace") for safe in ("/", "")]
            spellings = (line, repr(line)[1:-1], json.dumps(line)[1:-1], *in_urls)
            _hidden.update(dict.fromkeys(spellings, instead))


def hidden() -> dict[str, str]:
    """Return the hidden values, by the texts that are shown instead: for a process of our own."""
    return dict(_values)


def hide_environment() -> None:
    """Hide the values of environment variables that are called a key, token or password."""
    for name, value in os.environ.items():
        if _VARIABLES.search(name) and len(value) >= WORD:
            hide(value, f"${{oc.env:{name}}}")


def redact(text: str) -> str:
    """Return a text without secrets; it may be shown, written and sent."""
    for value in sorted(_hidden, key=len, reverse=True):
        if value in text:
            text = _replace(text, value, _hidden[value])
    if "://" in text:
        text = _USER.sub(HIDDEN, text)
        text = _hide_queries(text)
    text = _ASSIGNED.sub(rf"\1\2{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def public(value: Any) -> Any:
    """Return JSON values as they may be written and sent: redacted and escaped, also as keys."""
    if isinstance(value, str):
        return escaped(redact(value), "\n\t")
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {public(key): public(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in cast("Sequence[Any]", value)]
    return value


def restore(text: str) -> str:
    """Return a redacted text with the values of those variables that this process's config names.

    A file from outside cannot name others: it would read them into a path or a URL.
    """
    for instead, value in _values.items():
        text = text.replace(instead, value)
    return text


def has_credentials(url: str) -> bool:
    """Say whether a URL holds a user name or password, or is a web address with a query."""
    return bool(_USER.search(url)) or (url.startswith("http") and _hide_queries(url) != url)


def _replace(text: str, value: str, instead: str) -> str:
    if len(value) >= WORD:
        return text.replace(value, instead)
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", lambda _: instead, text)


def _hide_queries(text: str) -> str:
    return _QUERY.sub(lambda found: found[1] + _PARAMETER.sub(_hide_value, found[2]), text)


def _hide_value(parameter: re.Match[str]) -> str:
    return HIDDEN if parameter[1] is None else f"{parameter[1]}={HIDDEN}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return len(text) < 10
