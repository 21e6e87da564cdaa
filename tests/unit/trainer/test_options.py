"""Every option has a meaning and, if it is a number, a unit; docs/options.md has them all."""

from dataclasses import dataclass, field

import pytest

from tests.support.paths import ROOT
from tests.support.small_options import Colour, Item
from trainer.config import Config
from trainer.options import Option, groups, help_text, markdown, paths, sections

OPTIONS = [option for section in sections() for option in section.options]


def test_the_page_of_options_is_fresh() -> None:
    """A change of a path, a default or a meaning shows up in a diff of that page."""
    assert (ROOT / "docs" / "options.md").read_text() == markdown(), (
        "run: python -m trainer.options > docs/options.md"
    )


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.path)
def test_numbers_have_a_unit(option: Option) -> None:
    number = "int" in option.type or "float" in option.type
    assert bool(option.unit) == number, "write [unit] before the meaning, [1] for a plain number"


def test_meanings_are_sentences() -> None:
    for section in sections():
        assert section.meaning.endswith("."), section.path
    for option in OPTIONS:
        assert option.meaning.endswith("."), option.path
        assert option.meaning[0] != "[", option.path


def test_tables_hold_every_path_once() -> None:
    found = [section.path for section in sections()] + [option.path for option in OPTIONS]
    assert len(found) == len(set(found))
    outside_lists = {path for path in found if path and "[]" not in path}
    assert outside_lists == set(paths())
    assert {path for path in found if path.endswith("[]")} == {
        *("data.mixture[]", "data.filters[]", "data.caption_fields[]")
    }


@dataclass(kw_only=True)
class Page:
    """Two lines
    of text."""

    wide: list[int] = field(default_factory=lambda: [1, 2])
    """[channels] Widths: a | b,
    and more."""
    colour: Colour = Colour.blue
    """[sic] is no unit of a choice."""
    limit: float | None = None
    """[1] A bound."""
    name: str = ""
    """[in brackets]: a text that begins so."""
    items: list[Item] = field(default_factory=list)
    """Items."""
    item: Item = field(default_factory=lambda: Item(share=0.5))


def test_meanings_are_read_from_the_source() -> None:
    page, items, item = sections(Page)
    assert page.meaning == "Two lines of text."
    facts = [(one.path, one.type, one.default, one.unit, one.meaning) for one in page.options]
    assert facts == [
        ("wide", "list of int", "[1,2]", "channels", "Widths: a | b, and more."),
        ("colour", "choice", "blue", "sic", "is no unit of a choice."),
        ("limit", "float or null", "null", "1", "A bound."),
        ("name", "str", '""', "", "[in brackets]: a text that begins so."),
        ("items", "list of sections", "[]", "", "Items."),
    ]
    assert page.options[1].choices == {"red": "Warm, as fire.", "blue": ""}
    assert [(one.path, one.options[0].path) for one in (items, item)] == [
        ("items[]", "items[].share"),
        ("item", "item.share"),
    ]
    assert items.options[0].default == ""


@dataclass
class Mute:
    """Has an option without a meaning."""

    first: int = 0
    """[1] This one has a meaning."""
    second: int = 0


def test_an_option_without_a_meaning_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^second has no meaning: write a string below it in "):
        list(sections(Mute))


def test_defaults_are_those_of_a_config() -> None:
    shown = {option.path: option.default for option in OPTIONS}
    assert shown["train.max_steps"] == shown["task"] == shown["optim.lr"] == ""
    assert shown["optim.betas"] == "[0.9,0.999]"
    assert shown["data.flip"] == "false"
    assert shown["data.train"] == "${.dir}/train"
    assert shown["eval.features"] == "[inception]"
    assert shown["sampler.steps"] == str(Config().sampler.steps)


def test_help_wraps_and_marks_what_is_required() -> None:
    text = help_text("Do it.", ["train.max_steps", "sampler"], 76)
    assert text.startswith("Do it.\n\n+experiment=NAME: ")
    assert "  train.max_steps  (int, optimizer steps, ≥ 1, ≤ 10^9, required)\n" in text
    assert "  sampler.steps=50  (int, sampling steps, ≥ 1, ≤ 10^6)\n      Steps from noise" in text
    assert f"  sampler=NAME: {', '.join(groups()['sampler'])}\n" in text
    assert "      - heun: " in text
    assert "train.log_every" not in text
    assert max(map(len, text.splitlines())) <= 76
    with pytest.raises(KeyError, match=r"sampler\.stepz"):
        help_text("Do it.", ["sampler.stepz"], 60)
