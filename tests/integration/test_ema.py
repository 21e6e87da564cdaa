"""Several averages in a run, and one of another width made after it."""

from pathlib import Path

import pytest
import torch

from tests.support.processes import run_command
from tests.support.workshop import Workshop
from trainer.checkpoints.reader import chosen_checkpoint, latest_checkpoint
from trainer.cli import load_config
from trainer.config import Config
from trainer.ema.job import reconstruct
from trainer.sample.job import draw
from trainer.train.loop import fit

STEPS = 16
TRAIN = [f"train.max_steps={STEPS}", "checkpoint.every=100", "optim.lr=3e-3", "data.flip=false"]


def weights(config: Config, name: str) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(Path(config.run.dir) / "checkpoints")
    assert found is not None
    return found.average(name)[1]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return sum((value - other[name]).square().sum().item() for name, value in one.items()) ** 0.5


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run with snapshots of two widths."""
    widths = ["ema.sigma_rels=[0.05,0.1]", "ema.snapshot_every=2", "ema.snapshot_precision=fp32"]
    run = tmp_path_factory.mktemp("snapshots")
    overrides = workshop.overrides("emoji", *TRAIN, *widths, "ema.decays=[0.3,0.99]", run=run)
    assert fit(load_config(overrides)) == 0
    assert len(list((run / "ema" / "snapshots").iterdir())) == STEPS // 2
    return overrides


def test_another_width_is_that_of_a_run_that_kept_it(
    trained: list[str], workshop: Workshop, tmp_path: Path
) -> None:
    true = workshop.config("emoji", *TRAIN, "ema.sigma_rels=[0.15]", run=tmp_path)
    assert fit(true) == 0
    made = run_command("trainer.ema", *trained, "ema.reconstruct.sigma_rel=0.15")
    assert made.code == 0, made.said
    path = Path(made.out.rpartition("checkpoint.load=")[2].strip())
    assert path.name == f"step_{STEPS:08d}"

    config = load_config([*trained, f"checkpoint.load={path}"])
    expected, stored = weights(true, "sigma_rel_0.15"), weights(config, "sigma_rel_0.1")
    name, found = chosen_checkpoint(config).average(config.ema.use)
    assert name == "sigma_rel_0.15"
    assert distance(found, expected) < 0.05 * distance(stored, expected)

    config.sample.prompts, config.sample.out = ["a red circle"], str(tmp_path / "samples")
    draw(config)
    assert list((tmp_path / "samples").glob("*.png"))


def test_each_average_can_be_chosen_and_the_first_is_the_default(trained: list[str]) -> None:
    config = load_config(trained)
    first, second = weights(config, "decay_0.3"), weights(config, "decay_0.99")
    assert distance(weights(config, ""), first) == 0
    assert distance(first, second) > 0


def test_a_run_cannot_begin_an_average_half_way(trained: list[str]) -> None:
    config = load_config([*trained, "ema.decays=[0.3,0.95]"])
    with pytest.raises(ValueError, match=r"ema\.decays was \[0\.3,0\.99\], is \[0\.3,0\.95\]"):
        fit(config)


def test_without_snapshots_it_says_how_to_take_them(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train with ema\.sigma_rels=\[0\.05,0\.1\]"):
        reconstruct(workshop.config("emoji", run=tmp_path))
