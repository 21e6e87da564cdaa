"""New runs with the weights of another: what is taken, what is fresh, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.processes import run_command
from tests.support.workshop import Workshop
from trainer.checkpoints.reader import Checkpoint, latest_checkpoint
from trainer.config import Config
from trainer.export.job import export
from trainer.runtime.ranks import join
from trainer.sample.job import draw
from trainer.train.fine_tuning import begin_with
from trainer.train.loop import fit

TRAIN = ["data.flip=false", "ema.decays=[0.5,0.9]"]
STILL = ["optim.lr=1e-30", "train.max_steps=1"]
"""A step that leaves the weights as they are."""


@pytest.fixture(scope="module")
def origin(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("origin") / "run"
    config = workshop.config("emoji", *TRAIN, "train.max_steps=3", "optim.lr=1e-2", run=run)
    assert fit(config) == 0
    export(config)
    return run


def newest(run: Path) -> Checkpoint:
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    return found


def weights(run: Path) -> dict[str, Tensor]:
    return newest(run).tensors("weight")["weight"]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ([], "ema.decay_0.5", "average decay_0.5"),
        (["ema.use=decay_0.9"], "ema.decay_0.9", "average decay_0.9"),
        (["checkpoint.load_raw=true"], "weight", "raw weights"),
    ],
)
def test_a_new_run_has_the_chosen_weights_and_a_fresh_optimizer(
    options: list[str],
    kind: str,
    said: str,
    workshop: Workshop,
    origin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*TRAIN, *STILL, *options, f"checkpoint.load={origin}"]
    config = workshop.config("emoji", *words, run=tmp_path)
    assert fit(config) == 0
    step = f"{origin}/checkpoints/step_00000003"
    assert f"a new run with the {said} of {step}, and a fresh optimizer" in capsys.readouterr().out
    assert_equal(weights(tmp_path), newest(origin).tensors(kind)[kind])
    assert newest(tmp_path).training.adam_steps == {"": 1}
    (event,) = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert event["loaded"] == {"from": step, "weights": said, "optimizer": False}

    config.train.max_steps = 2
    assert fit(config) == 0
    assert "checkpoint.load is not read" in capsys.readouterr().out
    assert newest(tmp_path).step == 2


def test_the_optimizer_goes_on_with_moments_averages_and_its_count(
    workshop: Workshop, origin: Path, tmp_path: Path
) -> None:
    words = [*TRAIN, *STILL, f"checkpoint.load={origin}", "checkpoint.load_optimizer=true"]
    config = workshop.config("emoji", *words, run=tmp_path)
    assert fit(config) == 0
    old, new = newest(origin), newest(tmp_path)
    assert_equal(weights(tmp_path), weights(origin))
    assert new.step == 1
    assert new.training.adam_steps == {"": old.training.adam_steps[""] + 1}
    kinds = ("exp_avg_sq", "ema.decay_0.9", "weight")
    before, after = old.tensors(*kinds), new.tensors(*kinds)
    for name, moment in before["exp_avg_sq"].items():
        left = config.optim.betas[1] * moment
        assert (after["exp_avg_sq"][name] >= left * (1 - 1e-5)).all()
        average = before["ema.decay_0.9"][name].lerp(before["weight"][name], 1 - 4 / 13)
        torch.testing.assert_close(after["ema.decay_0.9"][name], average)


def test_two_ranks_that_share_the_weights_begin_with_the_same(
    workshop: Workshop, origin: Path, tmp_path: Path
) -> None:
    words = [*TRAIN, *STILL, f"checkpoint.load={origin}", "deepspeed.stage=3"]
    overrides = workshop.overrides("emoji", *words, run=tmp_path)
    done = run_command("trainer", *overrides, ranks=2)
    assert done.code == 0, done.said
    assert done.out.count("a new run with the average decay_0.5 of") == 1
    kind = "ema.decay_0.5"
    assert_equal(weights(tmp_path), newest(origin).tensors(kind)[kind])


def test_a_file_of_the_network_is_loaded_like_unet_weights(
    workshop: Workshop, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = origin / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    words = [*TRAIN, *STILL, f"checkpoint.load={file}"]
    assert fit(workshop.config("emoji", *words, run=tmp_path)) == 0
    assert f"a new run with the weights in {file}" in capsys.readouterr().out
    own = {name.removeprefix("unet."): value for name, value in weights(tmp_path).items()}
    assert_equal(own, load_file(file))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["unet.heads=[1,4]"], r"unet\.heads was \[1,2\], is \[1,4\]"),
        (["unet.block_out_channels=[8,16]"], r"unet\.block_out_channels was \[16,32\], is"),
        (["unet.weights=w.safetensors"], "checkpoint.load and unet.weights both"),
        (["ema.use=decay_0.7"], r"ema\.use=decay_0\.7: .* has decay_0\.5, decay_0\.9"),
        (
            ["checkpoint.load_optimizer=true", "ema.decays=[0.7]"],
            r"has decay_0\.5, decay_0\.9, and .* name decay_0\.7",
        ),
        (["checkpoint.load=nowhere"], "no run, checkpoint or weights file at nowhere"),
        (["checkpoint.load=conf"], "conf is no checkpoint"),
        (["checkpoint.load=conf/config.yaml"], "checkpoint.load, as unet.weights: .*config.yaml"),
        (["checkpoint.load=conf/config.yaml", "checkpoint.load_raw=true"], "has no averages"),
    ],
)
def test_what_does_not_fit_is_refused_and_begins_nothing(
    words: list[str], said: str, workshop: Workshop, origin: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = workshop.config("emoji", *TRAIN, f"checkpoint.load={origin}", *words, run=run)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        fit(config)
    assert "\n" not in str(raised.value)
    assert not list(run.iterdir())  # the folder was only locked


@pytest.mark.parametrize("as_file", [False, True])
def test_new_input_channels_are_zeros_and_have_to_be_asked_for(
    as_file: bool, workshop: Workshop, origin: Path, tmp_path: Path
) -> None:
    file = origin / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    load = f"checkpoint.load={file if as_file else origin}"
    config = workshop.config("emoji", *TRAIN, load, run=tmp_path)
    config.unet.in_channels = 7
    with pytest.raises(ValueError, match=r"^checkpoint\.load.*conv_in\.weight"):
        begin_with(config, join())
    config.unet.widen_input = True
    task, _ = begin_with(config, join())
    found = task.modules[task.averaged].state_dict()["unet.conv_in.weight"]
    assert torch.equal(found[:, :4], load_file(file)["conv_in.weight"])
    assert not found[:, 4:].any()
    assert found.shape[1] == 7


def test_weights_that_are_not_finite_begin_nothing(
    workshop: Workshop, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Checkpoint.average

    def broken(self: Checkpoint, name: str) -> tuple[str, dict[str, Tensor]]:
        name, tensors = found(self, name)
        return name, {**tensors, "unet.conv_in.bias": tensors["unet.conv_in.bias"] * torch.nan}

    monkeypatch.setattr(Checkpoint, "average", broken)
    config = workshop.config("emoji", *TRAIN, f"checkpoint.load={origin}", run=tmp_path)
    with pytest.raises(ValueError, match=r"not finite, in unet\.conv_in\.bias"):
        fit(config)


def first_stage(workshop: Workshop, run: Path, *words: str) -> Config:
    gan = ["autoencoder.loss.perceptual_weight=0", "autoencoder.loss.discriminator.layers=1"]
    small = ["autoencoder.loss.discriminator.channels=4", "autoencoder.loss.gan_start_step=1"]
    return workshop.config("emoji_autoencoder", *STILL, *gan, *small, *words, run=run)


def test_a_discriminator_is_taken_along_or_said_to_begin_untrained(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    adversarial = "autoencoder.loss.gan_weight=0.5"
    assert fit(first_stage(workshop, both, adversarial)) == 0
    assert fit(first_stage(workshop, alone, "autoencoder.loss.gan_weight=0")) == 0
    for origin, fresh in ((both, False), (alone, True)):
        run = tmp_path / f"from_{origin.name}"
        words = [adversarial, f"checkpoint.load={origin}", "run.seed=1"]
        assert fit(first_stage(workshop, run, *words)) == 0
        assert ("has no discriminator: it begins untrained" in capsys.readouterr().out) == fresh
        kind = "discriminator.weight"
        found = newest(run).tensors(kind)[kind]
        trained = newest(both).tensors(kind)[kind]
        moved = max((found[name] - value).abs().max().item() for name, value in trained.items())
        assert (moved > 1e-3) == fresh


def test_sampling_takes_the_newest_checkpoint_of_a_run_by_its_folder(
    workshop: Workshop, origin: Path, tmp_path: Path
) -> None:
    pictures: list[bytes] = []
    for number, load in enumerate((origin, newest(origin).path)):
        config = workshop.config("emoji", *TRAIN, f"checkpoint.load={load}", run=tmp_path)
        config.sample.prompts, config.sample.out = ["a red circle"], str(tmp_path / str(number))
        draw(config)
        pictures.append((tmp_path / str(number) / "00000.png").read_bytes())
    assert pictures[0] == pictures[1]
