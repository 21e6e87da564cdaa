"""Values that `data.secrets` hides, for one test."""

import pytest

from data import secrets


def forget_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with no hidden value, and bring the old ones back after the test."""
    for name in ("_hidden", "_values"):
        monkeypatch.setattr(secrets, name, {})
