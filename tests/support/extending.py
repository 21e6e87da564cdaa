"""docs/extending.md as code: what a section adds, added while a test runs."""

import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from tests.support.enums import add_member
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "extending.md"


def files_of(section: str) -> list[str]:
    """The files in the table of a section."""
    return re.findall(r"^\| `([^`]+)` \|", _text(section), flags=re.M)


def blocks_of(section: str) -> dict[str, str]:
    """The code of a section, by file."""
    found = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", _text(section), flags=re.M | re.S)
    return dict(found)


def add_section(monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    """Do as the section says: new modules and presets, and what is added to modules."""
    blocks = blocks_of(section)
    for path in sorted(blocks, key=lambda path: (ROOT / path).exists()):  # new modules first
        code = blocks[path]
        if path.endswith(".py"):
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if (ROOT / path).exists():
                _add_to(monkeypatch, import_module(name), code)
            else:
                _add_module(monkeypatch, name, code)
        elif path.endswith(".yaml"):
            _add_preset(monkeypatch, path, code)


def _text(section: str) -> str:
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[section]


def _add_module(monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, name, "exec"), vars(module))


def _add_preset(monkeypatch: pytest.MonkeyPatch, path: str, text: str) -> None:
    """Let Hydra find a file of conf/GROUP/ that is not there."""
    _, group, file = path.split("/")
    package = "_global_" if text.startswith("# @package _global_\n") else group
    content = OmegaConf.create(text)
    assert isinstance(content, DictConfig)
    node = ConfigNode(file, content, group, package, "docs/extending.md")
    repo = ConfigStore.instance().repo
    monkeypatch.setitem(repo, group, {**repo.get(group, {}), file: node})


def _add_to(monkeypatch: pytest.MonkeyPatch, page: ModuleType, code: str) -> None:
    """Add imports, functions, members of `class ...(StrEnum)`, entries of a dict or of a list."""
    whole = re.findall(r"^(?:from|import) .*\n|^def .*\n(?:    .*\n|\n)+", code, flags=re.M)
    names: dict[str, Any] = dict(vars(page))
    exec("".join(whole), names)
    for name, value in names.items():
        if name not in vars(page):
            monkeypatch.setattr(page, name, value, raising=False)
    for kind, body in re.findall(r"^class (\w+)\(StrEnum\):\n((?:    .*\n|\n)+)", code, flags=re.M):
        enum: type[StrEnum] = getattr(page, kind)
        for name in re.findall(r'^    (\w+) = "\1"$', body, flags=re.M):
            add_member(monkeypatch, enum, name)
    for table, body in re.findall(r"^(\w+) = \{\n    \.\.\.\n(.*?)^\}", code, flags=re.M | re.S):
        entries: Mapping[StrEnum, object] = eval(f"{{{body}}}", vars(page))
        for member, entry in entries.items():
            monkeypatch.setitem(getattr(page, table), member, entry)
    for table, body in re.findall(r"^(\w+) = \[\n    \.\.\.\n(.*?)^\]", code, flags=re.M | re.S):
        added: list[object] = eval(f"[{body}]", vars(page))
        monkeypatch.setattr(page, table, [*getattr(page, table), *added])
