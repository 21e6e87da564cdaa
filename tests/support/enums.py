"""Choices of an option that are added while a test runs."""

from enum import StrEnum
from typing import TypeVar

import pytest

Choice = TypeVar("Choice", bound=StrEnum)


def add_member(monkeypatch: pytest.MonkeyPatch, kind: type[Choice], name: str) -> Choice:
    """Give an enum a member whose value is its name, until the test ends."""
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    monkeypatch.setattr(kind, "_member_names_", [*kind._member_names_, name])
    monkeypatch.setitem(kind._member_map_, name, member)
    monkeypatch.setitem(kind._value2member_map_, name, member)
    return member
