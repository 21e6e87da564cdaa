"""Compiled code comes from folders of this user alone."""

import tempfile
from pathlib import Path

import pytest

from trainer.runtime.compile_caches import INDUCTOR, VARIABLES, use_private_caches


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_inductor_gets_a_folder_of_this_user(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    use_private_caches(environment)
    folder = Path(environment[INDUCTOR])
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    use_private_caches(environment)


def test_where_others_may_rename_the_folder_it_lies_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tmp_path.chmod(0o777)
    environment: dict[str, str] = {}
    with pytest.raises(PermissionError, match=f"^{INDUCTOR}: "):
        use_private_caches(environment)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "open"))
    tmp_path.chmod(0o700)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    use_private_caches(environment)
    assert environment[INDUCTOR] == str(tmp_path / "home/.cache/latent-foundry/inductor")


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, variable: str) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(PermissionError, match=f"^{variable}: other users can write to {planted}"):
        use_private_caches({variable: str(planted)})
    own = tmp_path / "own"
    environment = {variable: str(own)}
    use_private_caches(environment)
    assert environment[variable] == str(own)
