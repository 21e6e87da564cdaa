"""Filter samples by rules on their metadata, and count the samples that each rule drops."""

import math
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal

from data.config import FilterConfig, Missing
from data.shards.codecs import BadSampleError
from data.shards.manifest import FilterCount

Fields = Callable[[str], object]
"""Name of a field → its value; None for a missing field."""


def is_missing(value: object) -> bool:
    """Say whether a field has no value: null, NaN, an empty text or an empty list."""
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def as_number(value: object) -> float | None:
    """Convert a number or its text to float; None for any other value, and for NaN."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except OverflowError:
        assert isinstance(value, int)
        return math.inf if value > 0 else -math.inf
    except ValueError:
        return None
    return None if math.isnan(number) else number


def as_text(value: object) -> str | None:
    """Format a value as in the option `allowed`: 3, not 3.0; true, not True; dates as ISO 8601.

    Returns None for NaN, and for a value that is neither number, text nor date.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal):
        if is_missing(value):
            return None
        return f"{value:.0f}" if math.isfinite(value) and value == int(value) else str(value)
    if isinstance(value, date):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, int | str) else None


def rule_text(rule: FilterConfig) -> str:
    """Describe a rule in words, such as `256 <= width <= 512 or missing`."""
    lower, upper = as_text(rule.min), as_text(rule.max)
    if rule.allowed:
        words = f"{rule.name} in [{', '.join(rule.allowed)}]"
    elif upper is None:
        words = f"{rule.name} >= {lower}"
    elif lower is None:
        words = f"{rule.name} <= {upper}"
    else:
        words = f"{lower} <= {rule.name} <= {upper}"
    return words + (" or missing" if rule.missing is Missing.keep else "")


def keeps(rule: FilterConfig, value: object) -> bool:
    """Say whether a rule keeps a sample with this value of its field.

    Raises: BadSampleError where the value cannot be compared with what the rule states: such a
    sample is neither known to be right nor to be wrong.
    """
    if is_missing(value):
        return rule.missing is Missing.keep
    if rule.allowed:
        text = as_text(value)
        if text is None:
            raise BadSampleError(f"{rule.name} is {_type(value)}, no text to find in `allowed`")
        return text in rule.allowed
    number = as_number(value)
    if number is None:
        raise BadSampleError(f"{rule.name} is {_type(value)}, no number to compare")
    lower = -math.inf if rule.min is None else rule.min
    upper = math.inf if rule.max is None else rule.max
    return lower <= number <= upper


def _type(value: object) -> str:
    names = {"str": "text", "bytes": "text", "list": "a list", "dict": "an object"}
    name = type(value).__name__
    return names.get(name, f"a {name}")


def first_to_drop(rules: Sequence[FilterConfig], fields: Fields) -> int | None:
    """Return the number of the first rule that drops a sample; None if all rules keep it.

    Raises: BadSampleError where a field cannot be read, or not be compared.
    """
    for number, rule in enumerate(rules):
        if not keeps(rule, fields(rule.name)):
            return number
    return None


def count(rules: Sequence[FilterConfig], dropped: Sequence[int], kept: int) -> list[FilterCount]:
    """Count the samples that each rule kept and dropped, in the order of the rules.

    dropped: samples that each rule was the first to drop. kept: samples that all rules kept.
    """
    counts: list[FilterCount] = []
    left = kept + sum(dropped)
    for rule, drops in zip(rules, dropped, strict=True):
        left -= drops
        counts.append(FilterCount(rule=rule_text(rule), kept=left, dropped=drops))
    return counts
