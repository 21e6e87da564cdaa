"""Captions of composed scenes: what is there, and what lies where."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.shards.annotations import Box

FRONT, BEHIND = "in front of", "behind"


class Thing(NamedTuple):
    """A thing in a scene; its name is the label of its box."""

    box: Box
    """Around its visible part."""
    covers: set[str]
    """Names of the things behind it that it covers a part of."""

    @property
    def name(self) -> str:
        """Its name, which no other thing of the scene has."""
        return self.box.label

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of its box."""
        return (self.box.left + self.box.right) / 2, (self.box.top + self.box.bottom) / 2


def captions_of(
    things: Sequence[Thing], grounds: Sequence[str], below: Callable[[int], int]
) -> list[str]:
    """Write true captions of a scene, in several forms; the first tells of all things.

    things: at least one. grounds: kinds of background, the far one and perhaps the near one.
    below: draws a number from 0 to one less than its argument.
    """
    left = list(things)
    order = [left.pop(below(len(left))) for _ in things]
    where = " below ".join(reversed(grounds))
    names = _list([_one(thing) for thing in order])
    if len(order) == 1:
        placed = f"{_one(order[0])} {_place(order[0])}"
        return [placed, f"{placed}, {where}", f"{names}, {where}", order[0].name]
    first, second, *others = order
    turned = [f"{_one(first)} {relation(first, second)} {_one(second)}"]
    turned += [f"{_one(second)} {relation(second, first)} {_one(first)}"]
    rest = [f"{_one(other)} {relation(other, first)} the {first.name}" for other in others]
    tails = f", with {_list(rest)}" if rest else ""
    captions = [f"{turned[0]}{tails}", f"{turned[1]}{tails}", f"{turned[0]}{tails}, {where}", names]
    pairs = [(one, other) for one in order for other in order if other.name in one.covers]
    if pairs:
        front, back = pairs[below(len(pairs))]
        captions.append(f"{_one(front)} {FRONT} {_one(back)}")
        captions.append(f"{_one(back)} {BEHIND} {_one(front)}")
    return captions


def relation(one: Thing, other: Thing) -> str:
    """Say where a thing lies, seen from another, along the axis on which they differ more."""
    (x, y), (other_x, other_y) = one.centre, other.centre
    if abs(x - other_x) >= abs(y - other_y):
        return "left of" if x < other_x else "right of"
    return "above" if y < other_y else "below"


def _place(thing: Thing) -> str:
    """Say where a thing lies in the picture, by thirds."""
    x, y = thing.centre
    if not 1 / 3 <= x <= 2 / 3:
        return "on the left" if x < 1 / 3 else "on the right"
    if not 1 / 3 <= y <= 2 / 3:
        return "at the top" if y < 1 / 3 else "at the bottom"
    return "in the middle"


def _one(thing: Thing) -> str:
    return f"{'an' if thing.name[0].lower() in 'aeiou' else 'a'} {thing.name}"


def _list(parts: Sequence[str]) -> str:
    """Join parts: `a, b and c`."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
