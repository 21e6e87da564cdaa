"""The facts in brackets, read as a domain: what it holds, and how it is said."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config.domains import Domain, describe, outside
from tests.support.small_options import Colour, Item


@dataclass(kw_only=True)
class Page:
    """A page of options."""

    steps: int = 3
    """[steps, ≥ 1,
    ≤ 10^3] How many, 0 excluded."""
    name: str = "x"
    """[not empty] A name."""
    limit: float | None = None
    """[1, finite] A bound."""
    free: str = ""
    """[in brackets]: a text that begins so."""
    items: list[Item] = field(default_factory=list)
    """Items."""
    item: Item = field(default_factory=lambda: Item(share=0.5))


def test_a_string_gives_unit_facts_and_meaning() -> None:
    assert describe(Page, "steps") == ("steps", ["≥ 1", "≤ 10^3"], "How many, 0 excluded.")
    assert describe(Page, "name") == ("", ["not empty"], "A name.")
    assert describe(Page, "limit") == ("1", ["finite"], "A bound.")
    assert describe(Page, "free") == ("", [], "[in brackets]: a text that begins so.")
    assert describe(Page, "item") == ("", [], "")


def test_what_is_outside_is_named_with_value_domain_and_unit() -> None:
    assert list(outside(Page())) == []
    page = Page(steps=1001, name="", limit=math.inf, item=Item(share=0.0))
    page.items = [Item(share=0.1), Item(share=math.nan)]
    assert list(outside(page, "page")) == [
        "page.steps=1001 must be an integer ≥ 1 and ≤ 10^3 [steps]",
        "page.name= must be a text that is not empty",
        "page.limit=inf must be a number that is finite or null",
        "page.items[1].share=nan must be a number > 0 and ≤ 0.5 [share]",
        "page.item.share=0.0 must be a number > 0 and ≤ 0.5 [share]",
    ]


def test_a_long_value_is_cut_in_the_error() -> None:
    (line,) = outside(Page(steps=10**200))
    assert len(line) < 150


@pytest.mark.parametrize(
    ("hint", "facts", "inside", "beyond", "words"),
    [
        (int, ["≥ 0", "< 2^64"], [0, 2**64 - 1], [-1, 2**64, 1.0, True, "1", None], "an integer"),
        (float, ["0 or > 1", "≤ 9"], [0, 0.0, 1.5, 9], [1, 1.0, 9.5, -1, math.nan], "0 or > 1 and"),
        (float, ["≥ -100", "≤ 1.5"], [-100, 1.5], [-100.5, 1.6, math.inf, -math.inf], "≥ -100"),
        (list[float], ["≥ 0", "2 values"], [[0, 1.5]], [[], [1], [1, -1], 3, (1, 2)], "of 2 numb"),
        (list[int], ["1+ values"], [[7], [7, 8]], [[], [1.5], [True], "ab"], "1 or more integers"),
        (list[int], [], [[], [7]], [None, [None]], "a list of integers"),
        (list[bool], [], [[], [True]], [[1], ["true"]], "values true or false"),
        (bool, [], [True, False], [1, 0, "true", None], "true or false"),
        (str, ["not empty"], ["a"], ["", 3, True, None], "not empty"),
        (float | None, ["finite"], [None, 1e300], [math.nan, "1"], "finite or null"),
        (Colour, [], list(Colour), ["red", 1], "one of red, blue"),
        (list[Colour], [], [[], [Colour.red]], [["red"]], "a list of values of red, blue"),
    ],
)
def test_domains_hold_what_they_say(
    hint: object, facts: list[str], inside: list[object], beyond: list[object], words: str
) -> None:
    domain = Domain(hint, facts)
    assert [value for value in inside if value not in domain] == []
    assert [value for value in beyond if value in domain] == []
    assert words in str(domain)


NUMBERS = st.one_of(st.integers(-(10**6), 10**6), st.sampled_from([-0.5, 0.25, 1.5, 1e6]))


@settings(max_examples=300)
@given(low=NUMBERS, high=NUMBERS, number=NUMBERS | st.floats(), zero=st.booleans())
def test_bounds_are_those_of_arithmetic(low: float, high: float, number: float, zero: bool) -> None:
    facts = [f"{'0 or ' * zero}> {low}", f"≤ {high}"]
    expected = (low < number or (zero and number == 0)) and number <= high
    assert (number in Domain(float, facts)) == (expected and math.isfinite(number))
    assert (number in Domain(int, facts)) == (expected and isinstance(number, int))
