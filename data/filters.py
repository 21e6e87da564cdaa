"""Rules on a sample's metadata: which samples `trainer.pack` leaves out, and how many."""

import math
from collections.abc import Callable, Sequence

from data.config import FilterConfig, Missing
from data.manifest import FilterCount

Fields = Callable[[str], object]
"""Name of a field → its value; None where the sample has none."""


def as_number(value: object) -> float | None:
    """Read a number, also from text; None for what is none, and for NaN."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def as_text(value: object) -> str | None:
    """Write a value as `allowed` spells it: 3, not 3.0, and true; None for NaN and structures."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.0f}" if value.is_integer() else str(value)
    return str(value) if isinstance(value, int | str) else None


def describe(rule: FilterConfig) -> str:
    """Put a rule into words."""
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
    """Say whether a rule keeps a sample whose field has this value."""
    if rule.allowed:
        text = as_text(value)
        return rule.missing is Missing.keep if text is None else text in rule.allowed
    number = as_number(value)
    if number is None:
        return rule.missing is Missing.keep
    lower = -math.inf if rule.min is None else rule.min
    upper = math.inf if rule.max is None else rule.max
    return lower <= number <= upper


def first_to_drop(rules: Sequence[FilterConfig], fields: Fields) -> int | None:
    """Return the number of the first rule that drops a sample; None if all keep it."""
    for number, rule in enumerate(rules):
        if not keeps(rule, fields(rule.name)):
            return number
    return None


def count(rules: Sequence[FilterConfig], dropped: Sequence[int], kept: int) -> list[FilterCount]:
    """Count what each rule kept and dropped.

    Args:
        rules: In their order.
        dropped: Samples dropped by each.
        kept: Samples that all of them kept.
    """
    counts = []
    left = kept + sum(dropped)
    for rule, drops in zip(rules, dropped, strict=True):
        left -= drops
        counts.append(FilterCount(rule=describe(rule), kept=left, dropped=drops))
    return counts
