from pathlib import Path

import pytest

from data.storage.lease import NAME, take
from trainer.runs.ownership import owned


def test_a_folder_has_one_owner_and_is_free_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with owned(tmp_path / "run", "choose another run.name"):
        with pytest.raises(SystemExit) as refusal, owned(tmp_path / "run", "choose another"):
            pass
        assert refusal.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'run'} is in use by ")
        assert said.count("\n") == 1
        with owned(tmp_path / "run", "choose another", name=".other"):
            pass
    take(tmp_path / "run" / NAME, "").release()


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), owned(tmp_path, "choose another"):
        raise ValueError("inside")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "n" * 300, "file/below"])
def test_a_folder_that_cannot_be_is_refused_by_its_option(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = rf"^run\.dir: cannot write to {tmp_path / name}: .*; choose another folder$"
    with pytest.raises(OSError, match=wrong), owned(tmp_path / name, "choose another"):
        pass
