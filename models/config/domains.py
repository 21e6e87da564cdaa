"""Units, domains and meanings of options, read from the strings below them.

Before its meaning, a string may give facts in brackets: the unit of a number (1 for a plain
number), and the values that are allowed, whatever the other options are:

    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    \"\"\"[noise level, ≥ 0, ≤ 1, 2 values] Guide only at noise levels in this interval.\"\"\"

`≥ A`, `> A`, `≤ B` and `< B` are bounds, where 10^9 is a power; `0 or > 1` allows 0, too. A number
with the fact `finite` has no bounds. `2 values` and `1+ values` are lengths of a list. `not empty`
is a fact of text, and `#rrggbb` one of a colour.
"""

import ast
import inspect
import math
import operator
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Any, NamedTuple, TypeGuard, get_args, get_origin, get_type_hints

BOUND = re.compile(r"(0 or )?([≥>≤<]) (-?[\d.]+)(?:\^(\d+))?")
LENGTH = re.compile(r"(\d+)(\+?) values")
FINITE, NOT_EMPTY, COLOUR = "finite", "not empty", "#rrggbb"
COMPARISONS = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}
NOUNS = {
    bool: ("true or false", "values true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}


class Described(NamedTuple):
    """What the string below an option says."""

    unit: str
    """Unit of a number; empty for other types."""
    facts: Sequence[str]
    """Facts about the domain."""
    meaning: str
    """The rest; empty if the option has no string."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The values that an option may have, whatever the other options are."""

    hint: Any
    """Annotation of the option."""
    facts: Sequence[str]
    """Facts about the domain; see the module."""

    @property
    def kind(self) -> type:
        """Type of the option, or of the items of a list."""
        return next(one for one in get_args(self.hint) or (self.hint,) if one is not NoneType)

    def __contains__(self, value: object) -> bool:
        if get_origin(self.hint) is not list:
            return self._allows(value) or (value is None and NoneType in get_args(self.hint))
        if not _is_list(value):
            return False
        lengths = (_has_length(fact, len(value)) for fact in self.facts)
        return all(lengths) and all(map(self._allows, value))

    def __str__(self) -> str:
        """Complete the sentence "the option must be …"."""
        one, many = NOUNS.get(self.kind, ("a section", "sections"))
        if issubclass(self.kind, StrEnum):
            one = many = f"of {', '.join(self.kind)}"
            one, many = f"one {one}", f"values {many}"
        if get_origin(self.hint) is list:
            lengths = filter(None, map(LENGTH.fullmatch, self.facts))
            count = [f"{found[1]}{' or more' if found[2] else ''}" for found in lengths]
            one = " ".join(["a list of", *count, many])
        bounds = " and ".join(fact for fact in self.facts if BOUND.fullmatch(fact))
        others = (f"that is {fact}" for fact in self.facts if fact in (FINITE, NOT_EMPTY, COLOUR))
        null = "or null" if NoneType in get_args(self.hint) else ""
        return " ".join(filter(None, (one, bounds, *others, null)))

    def _allows(self, item: object) -> bool:
        kind = self.kind
        if isinstance(item, bool):  # Python's bools are integers
            return kind is bool
        if not isinstance(item, int | float):
            return isinstance(item, kind) and self._allows_text(str(item))
        if kind not in (int, float) or (kind is int and isinstance(item, float)):
            return False
        return math.isfinite(item) and all(_is_within(fact, item) for fact in self.facts)

    def _allows_text(self, text: str) -> bool:
        if COLOUR in self.facts and not re.fullmatch("#[0-9a-fA-F]{6}", text):
            return False
        return text != "" or NOT_EMPTY not in self.facts


def describe(owner: type, name: str) -> Described:
    """Return what the string below a field of a dataclass says."""
    text = " ".join(_strings(owner.__module__).get((owner.__name__, name), "").split())
    found = re.fullmatch(r"(?:\[([^\]]+)\] )?(.*)", text)
    assert found is not None
    facts = found[1].split(", ") if found[1] else []
    units = [fact for fact in facts if not _is_of_domain(fact)]
    return Described(", ".join(units), [fact for fact in facts if fact not in units], found[2])


def outside(config: object, path: str = "") -> Iterator[str]:
    """Yield a line for each option outside of its domain: its path, its value and the domain.

    config: a dataclass of options; path: its config path.
    """
    prefix = f"{path}." if path else ""
    for name, (domain, unit) in _domains(type(config)).items():
        value, place = getattr(config, name), prefix + name
        if is_dataclass(value):
            yield from outside(value, place)
        elif is_dataclass(domain.kind) and _is_list(value):
            for number, item in enumerate(value):
                yield from outside(item, f"{place}[{number}]")
        elif value not in domain:
            yield f"{place}={_shorten(value)} must be {domain}{unit and f' [{unit}]'}"


@cache
def _domains(owner: type) -> Mapping[str, tuple[Domain, str]]:
    """Map the fields of a dataclass to their domains and units."""
    hints = get_type_hints(owner)
    found: dict[str, tuple[Domain, str]] = {}
    for field in fields(owner):
        unit, facts, _ = describe(owner, field.name)
        found[field.name] = Domain(hints[field.name], facts), "" if unit == "1" else unit
    return found


@cache
def _strings(module: str) -> Mapping[tuple[str, str], str]:
    """Map (class, attribute) to the string below the attribute, which Python does not keep."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found: dict[tuple[str, str], str] = {}
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for member, below in pairwise(kind.body):
            match member, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[kind.name, name] = text
                case _:
                    pass
    return found


def _is_of_domain(fact: str) -> bool:
    known = BOUND.fullmatch(fact) or LENGTH.fullmatch(fact)
    return bool(known) or fact in (FINITE, NOT_EMPTY, COLOUR)


def _is_within(fact: str, number: float) -> bool:
    found = BOUND.fullmatch(fact)
    if found is None:
        return True
    zero, sign, base, power = found.groups()
    limit = (float(base) if "." in base else int(base)) ** int(power or 1)
    return (bool(zero) and number == 0) or COMPARISONS[sign](number, limit)


def _has_length(fact: str, length: int) -> bool:
    found = LENGTH.fullmatch(fact)
    if found is None:
        return True
    return length >= int(found[1]) if found[2] else length == int(found[1])


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
