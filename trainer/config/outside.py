"""Options come from outside: watch what they take from the environment, and check their text."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import cast

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from data.secrets import has_credentials, hide, hide_environment
from data.text import escaped

PROSE = ("eval.prompts", "sample.prompts", "sample.negative_prompt")
"""Options that may speak of URLs; all others name places, networks and runs."""

NAMES = ("run.experiment", "run.name", "run.dir", "eval.references")
"""Options that logs and job scripts show to find a run."""


def watch_environment() -> None:
    """Let `data.secrets.redact` know the values that configs take from the environment.

    They are shown as the interpolation that named them: `${oc.env:NAME}`.
    """
    hide_environment()
    OmegaConf.register_new_resolver("oc.env", _from_environment, replace=True)


def _from_environment(key: str, *default: str | None) -> str | None:
    value: str | None = oc.env(key, *default)
    if value is not None and key in os.environ:
        hide(value, f"${{oc.env:{key}}}")
    return value


def text_problems(config: object) -> Iterator[str]:
    """Yield the options of a config whose text cannot be used: their paths, the cause and the fix.

    The text itself is left out.
    """
    for path, text in texts(config):
        if "\0" in text:
            yield f"{path} holds the character NUL, which no name has"
        elif path in NAMES and escaped(text) != text:
            yield f"{path} holds control characters or text that is not Unicode: choose another"
        elif has_credentials(text) and path.partition("[")[0] not in PROSE:
            yield (
                f"{path}: a URL with a user name, a password or a query, which would be published: "
                "give credentials by the store's environment variables (docs/data.md)"
            )


def texts(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the config path and the value of each text in a tree of dataclasses and lists."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | tuple):
        for number, item in enumerate(cast("Sequence[object]", value)):
            yield from texts(item, f"{path}[{number}]")
    elif is_dataclass(value):
        for one in fields(value):
            name = f"{path}.{one.name}" if path else one.name
            yield from texts(getattr(value, one.name), name)
