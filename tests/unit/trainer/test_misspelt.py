"""A slip of the fingers in any known name is answered by that name, or by one as near."""

import re
from collections.abc import Sequence

import pytest
from hydra import compose, initialize_config_module
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.checks import explain
from trainer.config.gpus import gpu_table
from trainer.options import did_you_mean, groups, paths, sections

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_"
CHOICES = {one.path: [*one.choices] for section in sections() for one in section.options}
CLOSED = [*groups().values(), [*gpu_table()["cards"]], *filter(None, CHOICES.values())]
"""Names that one option or group takes."""


@pytest.fixture(scope="module")
def tree() -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", ["+experiment=emoji"])


@st.composite
def slips(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, str]:
    """A name, and the name with one character left out, swapped, replaced or added."""
    name = draw(st.sampled_from(names))
    place = draw(st.integers(0, len(name) - 1))
    before, here, after = name[:place], name[place], name[place + 1 :]
    letter = draw(st.sampled_from(LETTERS))
    changed = draw(st.sampled_from(["", after[:1] + here, letter, letter + here]))
    typed = before + changed + (after[1:] if changed == after[:1] + here else after)
    assume(typed and typed not in names)
    return name, typed


def edits(one: str, other: str) -> int:
    """The least number of insertions, deletions, replacements and swaps of neighbours.

    Source: the recurrence of Damerau (1964), in the restricted form of optimal string alignment.
    """
    table = {(i, -1): i + 1 for i in range(-1, len(one))}
    table |= {(-1, j): j + 1 for j in range(-1, len(other))}
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            steps = [table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)]
            if i and j and (a, one[i - 1]) == (other[j - 1], b):
                steps.append(table[i - 2, j - 2] + 1)
            table[i, j] = min(steps)
    return table[len(one) - 1, len(other) - 1]


def suggested(line: str) -> str:
    found = re.search(r" \(did you mean (.*)\?\)$", line)
    assert found is not None, line
    return found[1]


@settings(max_examples=300)
@given(pair=slips(sorted(paths())))
def test_an_option_is_answered_by_the_nearest_option(
    tree: DictConfig, pair: tuple[str, str]
) -> None:
    _, typed = pair
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.update(tree, typed, 1)
    line = explain(caught.value)
    named = line.partition(" is no option")[0]  # the first part of the path that is unknown
    assert typed.startswith(named)
    assert edits(named, suggested(line)) <= 1


@st.composite
def slips_in_choices(draw: st.DrawFn) -> tuple[Sequence[str], str, str]:
    names = draw(st.sampled_from(CLOSED))
    return (names, *draw(slips(names)))


@settings(max_examples=400)
@given(slip=slips_in_choices())
@example(slip=(groups()["experiment"], "laion_256", "laion_526"))
@example(slip=(["kl", "vq"], "kl", "k1"))
def test_a_choice_is_answered_by_the_nearest_choice(slip: tuple[list[str], str, str]) -> None:
    names, name, typed = slip
    near = suggested(did_you_mean(typed.upper(), names))
    assert near in names
    assert near == name or edits(typed, near) <= 1
