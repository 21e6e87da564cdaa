"""An exported run as diffusers sees it: the same tokens, the same latents, the same pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.conditioning.clip_text import ClipText
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.first_stage.autoencoder import AutoencoderKL, load_autoencoder
from tests.support.diffusers_pictures import drawn_by_diffusers
from tests.support.oracles import diffusers
from tests.support.workshop import Workshop
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.config import Config
from trainer.export.job import export
from trainer.pipeline import Pipeline
from trainer.train.loop import fit

PROMPTS = [
    "a red circle",
    "",
    "A  Blue SQUARE, isn't it? Wow!!! 123",
    "émoji 🦆 naïve " * 6,
]


@pytest.fixture(scope="module")
def config(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three steps; the first-stage's scale is far from 0 and 1 a channel."""
    run = tmp_path_factory.mktemp("export") / "run"
    options = ["train.max_steps=3", "optim.lr=0.01", "sampler.steps=6", "sampler.guidance_scale=3"]
    config = workshop.config("emoji", *options, run=run)
    assert fit(config) == 0
    export(config)
    return config


@pytest.fixture(scope="module")
def pipeline(config: Config) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(
        config.export.out, local_files_only=True
    )


def test_tokens_and_hidden_states_are_ours(config: Config, pipeline: Any) -> None:
    ours = build_conditioner(config.conditioner)
    assert isinstance(ours, ClipText)
    ids = pipeline.tokenizer(
        PROMPTS,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    assert torch.equal(ids, ours.tokenizer(PROMPTS))
    with torch.no_grad():
        states = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(
        states, ours.condition(Given(PROMPTS), (8, 8)).tokens, rtol=1e-5, atol=1e-5
    )


def test_the_first_stage_encodes_to_and_decodes_from_scaled_latents(
    config: Config, pipeline: Any
) -> None:
    scale = chosen_checkpoint(config).state.task["latent_scale"]
    mean, std = (torch.tensor(scale[name]).view(-1, 1, 1) for name in ("mean", "std"))
    assert (std.log().abs() > 0.05).any()
    ours = load_autoencoder(config.autoencoder)
    assert isinstance(ours, AutoencoderKL)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        moments = ours.encode(images)
        found = pipeline.vae.encode(images).latent_dist
        torch.testing.assert_close(found.mean, (moments[:, 0] - mean) / std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.std, (0.5 * moments[:, 1]).exp() / std, rtol=1e-4, atol=1e-7
        )
        decoded = pipeline.vae.decode(found.mean).sample
        torch.testing.assert_close(decoded, ours.decode(moments[:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_pictures_are_ours(config: Config, pipeline: Any, size: tuple[int, int]) -> None:
    ours = Pipeline.load(config, chosen_checkpoint(config), torch.device("cpu"))
    numbers = range(len(PROMPTS))
    expected = ours.draw(Given(PROMPTS), numbers, seed=5, size=size).float() / 255
    found = drawn_by_diffusers(pipeline, PROMPTS, config.sampler, size)
    assert (found - expected).abs().mean().item() < 1 / 255
    assert expected.std().item() > 0.02


def test_the_card_says_how_to_use_it_and_what_it_is(config: Config) -> None:
    folder = Path(config.export.out)
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=6, guidance_scale=3.0" in card
    assert "optimizer steps: 3" in card
    assert "images seen: 24" in card
    assert "images with captions" in card
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    _, averaged = chosen_checkpoint(config).average("")
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {f"unet.{name}" for name in stored} == averaged.keys()
    assert all(torch.equal(value, averaged[f"unet.{name}"]) for name, value in stored.items())


def test_a_second_export_replaces_the_first_and_nothing_else(
    config: Config, tmp_path: Path
) -> None:
    (Path(config.export.out) / "stale.txt").write_text("of the first")
    export(config)
    assert not (Path(config.export.out) / "stale.txt").exists()
    elsewhere = replace(config, export=replace(config.export, out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"^export.out: .* exists and is no export"):
        export(elsewhere)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["conditioner=none", "unet.context_dim=0"], "conditioner.kind=none"),
        (["diffusion=flow", "diffusion.zero_terminal_snr=false"], "diffusion.schedule=flow"),
        (["sampler=heun"], "sampler.name=heun"),
        (["autoencoder.kind=vq"], "autoencoder.kind=vq"),
        (["conditioner.features=pooled"], "conditioner.features=pooled"),
    ],
)
def test_what_diffusers_has_no_pipeline_for_is_named(
    workshop: Workshop, config: Config, options: list[str], words: str
) -> None:
    other = workshop.config("emoji", *options, run=Path(config.run.dir))
    with pytest.raises(ValueError, match=words):
        export(other)
