"""One factor for all latents: in imported models, in training, in sampling and in exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.conditioning.given import Given
from models.first_stage.autoencoder import load_autoencoder
from models.latent_diffusion import LatentScale
from tests.support.diffusers_pictures import drawn_by_diffusers
from tests.support.oracles import diffusers
from tests.support.processes import run_command
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import Checkpoint, chosen_checkpoint
from trainer.config import Config
from trainer.export.job import export
from trainer.pipeline import Pipeline
from trainer.train import latent_scale
from trainer.train.loop import fit

STILL = ["optim.lr=1e-30", "train.max_steps=1", "sampler.steps=6", "sampler.guidance_scale=3"]
FIRST_BATCH = [
    *("diffusion.latent_scale=first_batch", "optim.schedule=constant"),
    *("train.max_steps=4", "checkpoint.every=2"),
]
PROMPTS = ["a red circle", "", "a blue square"]


def newest(config: Config) -> Checkpoint:
    """The newest checkpoint of the run itself."""
    return chosen_checkpoint(replace(config, checkpoint=replace(config.checkpoint, load="")))


def factor(config: Config) -> float:
    scale = LatentScale(**newest(config).state.task["latent_scale"])
    assert scale.is_factor
    return 1 / scale.values["std"][0]


def weights(config: Config) -> dict[str, Tensor]:
    return newest(config).tensors("weight")["weight"]


@pytest.fixture(scope="module")
def theirs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of diffusers that has a first stage of the workshop, and its factor."""
    folder = tmp_path_factory.mktemp("theirs")
    config = workshop.config("emoji", "train.max_steps=1", "optim.lr=0.03", run=folder / "run")
    assert fit(config) == 0
    export(config)
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        config.export.out, local_files_only=True
    )
    pipeline.vae.load_state_dict(load_file(config.autoencoder.weights))
    with torch.no_grad():
        latents = load_autoencoder(config.autoencoder).encode(torch.rand(8, 3, 32, 32) * 2 - 1)
    assert abs(latents[:, 0].std().log().item()) > 0.1
    pipeline.vae.register_to_config(scaling_factor=0.7 / latents[:, 0].std().item())
    return pipeline


@pytest.fixture(scope="module")
def imported(
    theirs: Any, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Tensor]:
    """A run that began with this model and learned nothing, with the pictures that it draws."""
    folder = tmp_path_factory.mktemp("imported")
    theirs.save_pretrained(folder / "theirs")
    name = "diffusion_pytorch_model.safetensors"
    files = [f"unet.weights={folder}/theirs/unet/{name}"]
    files += [f"autoencoder.weights={folder}/theirs/vae/{name}"]
    config = workshop.config("emoji", *STILL, *files, run=folder / "run")
    assert fit(config) == 0
    return config, drawn(Pipeline.load(config, newest(config), torch.device("cpu")))


def drawn(pipeline: Pipeline) -> Tensor:
    return pipeline.draw(Given(PROMPTS), range(len(PROMPTS)), seed=5).float() / 255


def test_an_imported_model_draws_as_in_diffusers(
    theirs: Any, imported: tuple[Config, Tensor]
) -> None:
    config, ours = imported
    assert factor(config) == pytest.approx(theirs.vae.config.scaling_factor, rel=1e-12)
    found = drawn_by_diffusers(theirs, PROMPTS, config.sampler, (32, 32))
    assert (found - ours).abs().mean().item() < 1 / 255
    assert ours.std().item() > 0.02


def test_its_export_draws_the_same(imported: tuple[Config, Tensor]) -> None:
    config, ours = imported
    export(config)
    device = torch.device("cpu")
    exported = drawn(Pipeline.load_export(config, Path(config.export.out), device))
    assert (exported - ours).abs().max().item() <= 1.5 / 255


def test_a_run_that_begins_with_it_keeps_its_factor(
    imported: tuple[Config, Tensor], workshop: Workshop, tmp_path: Path
) -> None:
    origin, _ = imported
    for scaling, kept in (("auto", True), ("channels", False)):
        words = [f"checkpoint.load={origin.run.dir}", f"diffusion.latent_scale={scaling}"]
        config = workshop.config("emoji", *STILL, *words, run=tmp_path / scaling)
        assert fit(config) == 0
        scale = newest(config).state.task["latent_scale"]
        assert (scale == newest(origin).state.task["latent_scale"]) is kept


def test_the_factor_of_the_first_batch_is_kept_and_resumed_bit_for_bit(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = workshop.config("emoji", *FIRST_BATCH, run=tmp_path / "whole")
    assert fit(whole) == 0
    parts = workshop.config("emoji", *FIRST_BATCH, "train.max_steps=2", run=tmp_path / "parts")
    assert fit(parts) == 0
    # another machine may round otherwise
    monkeypatch.setattr(latent_scale, "_of_first_batch", lambda *_: 1.2345)
    parts.train.max_steps = 4
    assert fit(parts) == 0
    assert factor(parts) == factor(whole) != 1.2345
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_ranks_share_the_factor_of_the_first_batch(workshop: Workshop, tmp_path: Path) -> None:
    configs = [
        workshop.config("emoji", *FIRST_BATCH, run=tmp_path / name) for name in ("one", "two")
    ]
    assert fit(configs[0]) == 0
    overrides = workshop.overrides("emoji", *FIRST_BATCH, run=tmp_path / "two")
    done = run_command("trainer", *overrides, ranks=2)
    assert done.code == 0, done.said
    assert done.out.count("1 / deviation in the first batch") == 1
    assert factor(configs[0]) == factor(configs[1])
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
