"""Every option has a domain, and every command refuses what is outside of it."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.config.domains import BOUND
from trainer.checks import contradictions, explain, to_config
from trainer.config import Config
from trainer.options import Option, sections

OPTIONS = [
    option
    for section in sections()
    for option in section.options
    if option.type != "list of sections"
]
NUMBERS = [option for option in OPTIONS if option.domain.kind in (int, float)]
LIST_ITEMS = [
    "data.filters=[{name: width, min: 1}]",
    "data.mixture=[{latents: x, weight: 1}]",
    "data.caption_fields=[{name: x}]",
]


def first_item(path: str) -> str:
    """The path of the option in the first item of a list."""
    return path.replace("[]", "[0]")


def wrong_items(option: Option) -> Iterator[object]:
    """Values that an option, or the items of its list, may not have."""
    kind, facts = option.domain.kind, option.domain.facts
    if kind in (int, float):
        yield from (math.nan, math.inf, -math.inf, True, "1e-4", "nan", [], [[]])
        yield from [10**30] if "finite" not in facts else []
        yield from [1.5] if kind is int else []
        for found in filter(None, map(BOUND.fullmatch, facts)):
            sign, base, power = found.groups()[1:]
            bound = (float(base) if "." in base else int(base)) ** int(power or 1)
            yield bound + {"≥": -1, "≤": 1}.get(sign, 0)
    elif kind is str:
        yield from (3, True, [])
        yield from [""] if "not empty" in facts else []
    elif kind is bool:
        yield from (0, 1, "true", math.nan)
    else:
        yield from ("nonsense", 1, True)


def wrong_values(option: Option) -> Iterator[object]:
    items = list(wrong_items(option))
    if not option.type.startswith("list"):
        yield from items
        yield from [None] if "null" not in option.type else []
        return
    yield from ([item] for item in items)
    yield from (None, 3, "x")
    yield from [[]] if any("values" in fact for fact in option.domain.facts) else []


@pytest.fixture(scope="module")
def tree() -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", ["+experiment=emoji", *LIST_ITEMS])


@pytest.fixture(scope="module")
def config(tree: DictConfig) -> Config:
    return to_config(tree)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.path)
def test_what_is_outside_of_a_domain_is_refused(config: Config, option: Option) -> None:
    changed: Any = copy.deepcopy(config)
    path = first_item(option.path)
    *owners, name = path.split(".")
    owner = changed
    for part in owners:
        owner = getattr(owner, part.removesuffix("[0]"))
        owner = owner[0] if part.endswith("[0]") else owner
    for value in wrong_values(option):
        setattr(owner, name, value)
        (line,) = contradictions(changed, ranks=1)
        assert line.startswith(f"{path}="), value
        assert f" must be {option.domain}" in line


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.path)
def test_numbers_have_a_range(option: Option) -> None:
    signs = [found[2] for fact in option.domain.facts if (found := BOUND.fullmatch(fact))]
    low_and_high = bool({"≥", ">"} & set(signs)) and bool({"≤", "<"} & set(signs))
    assert low_and_high or "finite" in option.domain.facts, "write [unit, ≥ 1, ≤ 10^9]"


@pytest.mark.parametrize("value", [math.nan, 10**20])
def test_a_config_is_checked_when_it_is_converted(tree: DictConfig, value: float) -> None:
    changed, expected = copy.deepcopy(tree), set[str]()
    for option in NUMBERS:
        if isinstance(value, float) and option.domain.kind is int:
            continue
        if "finite" in option.domain.facts and math.isfinite(value):
            continue
        path = first_item(option.path)
        OmegaConf.update(changed, path, [value] if option.type.startswith("list") else value)
        expected.add(path)
    with pytest.raises(ValueError, match="must be") as caught:
        to_config(changed)
    lines = explain(caught.value).split("; ")
    assert {line.partition("=")[0] for line in lines} == expected


def test_a_debugger_changes_no_line(tree: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OC_CAUSE", "1")  # as omegaconf behaves under a debugger or coverage
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.update(tree, "run.seed", "fast")
    assert caught.value.__cause__ is not None
    assert explain(caught.value).startswith("run.seed: ")


@pytest.mark.parametrize("value", [True, "fast", [[]], {"a": 1}, None])
def test_a_wrong_type_is_answered_by_the_domain(tree: DictConfig, value: object) -> None:
    for option in NUMBERS:
        if not option.type.startswith("list") and not ("null" in option.type and value is None):
            with pytest.raises(OmegaConfBaseException) as caught:
                OmegaConf.update(tree, first_item(option.path), value)
            line = explain(caught.value)
            assert option.path.replace("[]", "") in line.replace("[0]", "")
            assert line.endswith(f"must be {option.domain}")
