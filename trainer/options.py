"""Options and their meanings, read from the source code of the config dataclasses.

`python -m trainer.options > docs/options.md` writes the page of all options; `--help` of a command
prints the sections of that command.
"""

import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import omegaconf

import conf
from models.config.domains import Domain, describe
from trainer.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One leaf of the config tree, as text for people."""

    path: str
    type: str
    default: str
    """In the spelling of a command line; empty if an experiment has to give a value."""
    unit: str
    """Unit of a number; 1 for a plain number, empty for other types."""
    domain: Domain
    """Values that are allowed, whatever the other options are."""
    meaning: str
    choices: Mapping[str, str]
    """Values of an enum and their meanings; a meaning may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One config dataclass at its place in the tree."""

    kind: type
    """The dataclass."""
    path: str
    """Config path: empty for the root; ends in [] for the items of a list."""
    meaning: str
    options: Sequence[Option]


def paths(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the config paths of all options and sections, without those of list items."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        if is_dataclass(hint) and isinstance(hint, type):
            yield from paths(hint, f"{prefix}{name}.")


@cache
def all_sections() -> Sequence[Section]:
    """Return the sections of Config."""
    return tuple(sections())


def is_switch(path: str) -> bool:
    """Return whether a config path is that of an option that is true or false."""
    options = (option for section in all_sections() for option in section.options)
    return any(option.path == path and option.type == "bool" for option in options)


def sections(kind: type = Config, path: str = "") -> Iterator[Section]:
    """Yield all sections with their own options, in the order of the dataclasses.

    Raises: ValueError that names an option without a meaning.
    """
    hints, prefix = get_type_hints(kind), f"{path}." if path else ""
    own = [one for one in fields(kind) if not is_dataclass(hints[one.name])]
    options = [_option(kind, one, hints[one.name], prefix + one.name) for one in own]
    meaning = " ".join((inspect.getdoc(kind) or "").split())
    yield Section(kind=kind, path=path, meaning=meaning, options=options)
    for name, hint in hints.items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from sections(hint, prefix + name)
        items = get_args(hint)
        if items and is_dataclass(items[0]) and isinstance(items[0], type):
            yield from sections(items[0], f"{prefix}{name}[]")


def _option(kind: type, field: Field[Any], hint: Any, path: str) -> Option:
    unit, facts, meaning = describe(kind, field.name)
    if not meaning:
        raise ValueError(f"{path} has no meaning: write a string below it in {kind.__module__}")
    return Option(
        path=path,
        type=_type(hint),
        default=_default(field),
        unit=unit,
        domain=Domain(hint, facts),
        meaning=meaning,
        choices=_choices(hint),
    )


def _type(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}".replace("choice", "choices")
    if isinstance(hint, UnionType):
        return " or ".join("null" if one is type(None) else _type(one) for one in get_args(hint))
    if issubclass(hint, StrEnum):
        return "choice"
    return "sections" if is_dataclass(hint) else hint.__name__


def _choices(hint: Any) -> Mapping[str, str]:
    (kind,) = get_args(hint) if get_origin(hint) is list else (hint,)
    if not (isinstance(kind, type) and issubclass(kind, StrEnum)):
        return {}
    meanings = dict(re.findall(r"^(\w+): (.+(?:\n    .+)*)", inspect.getdoc(kind) or "", re.M))
    return {one.value: " ".join(meanings.get(one.name, "").split()) for one in kind}


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return _value(field.default_factory())
    required = field.default is MISSING or field.default == omegaconf.MISSING
    return "" if required else _value(field.default)


def _value(value: Any) -> str:
    match value:
        case [*items]:
            return f"[{','.join(map(_value, items))}]"
        case bool():
            return str(value).lower()
        case "":
            return '""'
        case None:
            return "null"
        case _:
            return str(value)


def groups() -> Mapping[str, Sequence[str]]:
    """Return the folders of conf/ and the files in each: `sampler=ddim` picks sampler/ddim.yaml."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(conf.__path__[0]).glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the most similar of the names; empty if none is similar.

    A name that one slip of the fingers explains comes first. A part of two or more characters is
    similar, too, and case does not matter.
    """
    cases = {one.lower(): one for one in names}
    part = name.lower()
    slips = [one for one in cases if _one_slip(part, one)]
    near = difflib.get_close_matches(part, slips or cases, n=1, cutoff=0.0 if slips else 0.6)
    near = near or [one for one in cases if len(part) > 1 and part in one][:1]
    return "".join(f" (did you mean {cases[one]}?)" for one in near)


def _one_slip(typed: str, name: str) -> bool:
    """Return whether one character was left out, added or replaced, or two were swapped."""
    pairs = zip(typed, name, strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    typed, name = typed[same:], name[same:]
    swapped = typed[:2] == name[:2][::-1] and typed[2:] == name[2:]
    return swapped or name[1:] in (typed, typed[1:]) or name == typed[1:]


def help_text(about: str, names: Sequence[str], width: int) -> str:
    """Return the help of a command.

    about: its docstring. names: sections and options to describe. width: characters of a line.
    Raises: KeyError for a name that is neither a section nor an option.
    """
    picks = groups()
    experiments = f"+experiment=NAME: {', '.join(picks['experiment'])}"
    lines = [about.strip(), "", *_wrap(experiments, width)]
    for section, chosen in _chosen(names):
        title = f"{section.path}: {section.meaning}" if section.path else "top level:"
        lines += ["", *_wrap(title, width)]
        if section.path in picks and len(chosen) == len(section.options):
            lines += _wrap(f"{section.path}=NAME: {', '.join(picks[section.path])}", width, 2)
        for option in chosen:
            lines += _option_lines(option, width)
    footer = "docs/options.md lists every option; --hydra-help shows the switches of Hydra."
    return "\n".join([*lines, "", *_wrap(footer, width, hanging=0)])


def _chosen(names: Sequence[str]) -> list[tuple[Section, Sequence[Option]]]:
    """Return the named sections and options, by section, in the order of `names`."""
    whole = {section.path: section for section in all_sections()}
    single = {one.path: (section, one) for section in whole.values() for one in section.options}
    chosen: dict[str, list[Option]] = {}
    for name in names:
        if name in whole:
            chosen[name] = list(whole[name].options)
        else:
            section, option = single[name]
            chosen.setdefault(section.path, []).append(option)
    return [(whole[path], options) for path, options in chosen.items()]


def _option_lines(option: Option, width: int) -> Iterator[str]:
    unit = "" if option.unit == "1" else option.unit
    required = "" if option.default else "required"
    facts = ", ".join(filter(None, (option.type, unit, *option.domain.facts, required)))
    value = f"={option.default}" if option.default else ""
    yield from _wrap(f"{option.path}{value}  ({facts})", width, 2, 10)
    yield from _wrap(option.meaning, width, 6, 6)
    for name, meaning in option.choices.items():
        yield from _wrap(f"- {name}: {meaning}".removesuffix(": "), width, 6)


def _wrap(text: str, width: int, indent: int = 0, hanging: int | None = None) -> list[str]:
    """Wrap text into lines of `width` characters; indent those after the first by two more."""
    rest = indent + 2 if hanging is None else hanging
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def markdown() -> str:
    """Return the page of all options, docs/options.md."""
    lines = [
        "# Options",
        "",
        "<!-- written by `python -m trainer.options > docs/options.md` from the config pages -->",
        "",
        "A command line gives an option as `path=value`. An option without a default must be",
        "given, as a rule by the experiment. The unit 1 marks a plain number. A value out of its",
        "range is refused; 10^9 is a power, `0 or > 1` allows 0, and `1+ values` is the length",
        "of a list. `--help` of a command shows the options that belong to it.",
        "",
        "Files of `conf/` set many options at once; `sampler=ddim` picks one:",
        "",
        "| group | files |",
        "|---|---|",
        *(f"| `{group}` | `{'`, `'.join(names)}` |" for group, names in groups().items()),
    ]
    for section in all_sections():
        lines += ["", f"## {section.path or 'Top level'}", section.meaning]
        if section.options:
            lines += [
                "",
                "| option | type | range | default | unit | meaning |",
                "|---|---|---|---|---|---|",
            ]
            lines += map(_row, section.options)
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    default = f"`{option.default}`" if option.default else "–"
    named = (f"`{name}`: {text}" if text else f"`{name}`." for name, text in option.choices.items())
    meaning = " ".join([option.meaning, *named])
    within = ", ".join(option.domain.facts) or "–"
    cells = (f"`{option.path}`", option.type, within, default, option.unit or "–", meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(markdown())
