"""Compiled blocks compute what the others do; compiling takes minutes, so this is a campaign."""

from pathlib import Path

import pytest

from tests.conftest import Workshop, losses
from trainer.loop import fit


@pytest.mark.campaign
@pytest.mark.parametrize("experiment", ["emoji", "emoji_autoencoder"])
def test_compiled_blocks_have_the_loss_curve_of_the_others(
    experiment: str, workshop: Workshop, tmp_path: Path
):
    curves = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        options = ["train.max_steps=4", "data.flip=false", f"train.compile={compiled}"]
        assert fit(workshop.config(experiment, *options, run=run)) == 0
        curves.append(losses(run))
    plain, compiled = curves
    assert sorted(plain) == sorted(compiled) == [1, 2, 3, 4]
    assert max(abs(plain[step] - compiled[step]) for step in plain) < 1e-5
