"""Filter samples by rules on their metadata, and count the samples that each rule drops."""

import math
from collections.abc import Callable, Sequence

from data.config import FilterConfig, Missing
from data.shards.manifest import FilterCount

Fields = Callable[[str], object]
"""Name of a field → its value; None for a missing field."""


def as_number(value: object) -> float | None:
    """Convert a number or its text to float; None for any other value, and for NaN."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def as_text(value: object) -> str | None:
    """Format a value as in the option `allowed`: 3, not 3.0; true, not True.

    Returns None for NaN, and for a value that is neither number nor text.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.0f}" if value.is_integer() else str(value)
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
    """Say whether a rule keeps a sample with this value of its field."""
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
    """Return the number of the first rule that drops a sample; None if all rules keep it.

    Raises: BadSampleError where a field cannot be read.
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
