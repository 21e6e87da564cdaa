"""Counts of what is left out: complete, with examples, in bounded memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.account import MAX_EXAMPLES, MAX_REASONS, OTHER, Fate, LeftOut, Tally, total

Thing = tuple[Fate, str, str]
THINGS = st.lists(
    st.tuples(st.sampled_from(Fate), st.sampled_from("abc"), st.text(max_size=3)), max_size=30
)


@settings(max_examples=200)
@given(THINGS, THINGS)
def test_merged_tallies_count_as_one(first: list[Thing], second: list[Thing]) -> None:
    whole, left, right = Tally(), Tally(), Tally()
    for one in first:
        left.add(*one)
    for one in second:
        right.add(*one)
    for one in first + second:
        whole.add(*one)
    left.merge(right.entries())
    assert left.entries() == whole.entries()
    for fate in Fate:
        assert total(whole.entries(), fate) == sum(one[0] is fate for one in first + second)
    assert all(len(entry.examples) == min(entry.count, MAX_EXAMPLES) for entry in whole.entries())


def test_many_reasons_are_counted_together_and_the_largest_comes_first() -> None:
    tally = Tally()
    for number in range(2 * MAX_REASONS):
        tally.add(Fate.rejected, f"size {number}", "x")
    first, *others = tally.entries()
    assert (first.reason, first.count, len(others)) == (OTHER, MAX_REASONS, MAX_REASONS)
    assert str(first) == f"rejected {MAX_REASONS}: {OTHER} (x, x, x, …)"


def test_names_are_shown_without_control_characters() -> None:
    entry = LeftOut(fate="damaged", reason="\x1b[2J", count=1, examples=["\x07"])
    assert str(entry) == "damaged 1: \\x1b[2J (\\x07)"
