"""Where drawn images go: those of two runs never lie in one folder."""

from pathlib import Path

import pytest
import torch

from trainer.cli import load_config
from trainer.pictures.png import save_png
from trainer.sample.job import folder_of

IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


def about(run: Path, step: int = 3) -> dict[str, object]:
    return {"checkpoint": str(run / "checkpoints" / f"step_{step:08d}"), "step": step, "seed": 0}


def test_each_draw_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = load_config(["+experiment=emoji", f"run.dir={tmp_path}"])
    drawn = folder_of(config, ["a", "b", "a", "b"], about(tmp_path / "one"))
    assert drawn.parent == tmp_path / "samples"
    assert drawn.name.startswith("step_00000003_")
    assert folder_of(config, ["a", "b"], about(tmp_path / "one")) == drawn, "more of each prompt"
    others = [
        folder_of(config, ["a"], about(tmp_path / "one")),
        folder_of(config, ["a", "b"], about(tmp_path / "two")),
        folder_of(config, ["a", "b"], about(tmp_path / "one", step=4)),
        folder_of(config, ["a", "b"], about(tmp_path / "one") | {"seed": 1}),
        folder_of(config, ["a", "b"], {"export": str(tmp_path / "export")}),
    ]
    assert len({drawn, *others}) == 6


def test_a_named_folder_takes_the_images_of_one_run(tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    config = load_config(["+experiment=emoji", f"sample.out={out}"])
    assert folder_of(config, ["a"], about(tmp_path / "one")) == out
    save_png(out / "00000.png", IMAGE, about(tmp_path / "one"))
    assert folder_of(config, ["a"], about(tmp_path / "one", step=9)) == out
    for other in (about(tmp_path / "two"), {"export": str(tmp_path / "one")}):
        with pytest.raises(ValueError, match=r"sample\.out: .* holds images of .*one.checkpoints"):
            folder_of(config, ["a"], other)


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_pictures_of_others_are_not_overwritten(tmp_path: Path, content: bytes) -> None:
    config = load_config(["+experiment=emoji", f"sample.out={tmp_path}"])
    (tmp_path / "00000.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"sample\.out: .* holds images of an unknown source"):
        folder_of(config, ["a"], about(tmp_path / "run"))
