"""Kinds of options for tests of what is read from their docstrings."""

from dataclasses import dataclass
from enum import StrEnum


class Colour(StrEnum):
    """Colours.

    red: Warm,
        as fire.
    """

    red = "red"
    blue = "blue"


@dataclass(kw_only=True)
class Item:
    """An item."""

    share: float
    """[share, > 0, ≤ 0.5] Its part."""
