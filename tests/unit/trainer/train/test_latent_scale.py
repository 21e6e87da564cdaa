"""The factor of latents: from the first batch on any number of ranks, and from files of others."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from data.config import DataConfig
from models.latent_diffusion import LatentScale
from tests.support.data_sets import DataSet
from tests.support.oracles import diffusers
from tests.support.streams import latents, take
from tests.support.workshop import NETWORKS, RUN
from trainer.cli import load_config
from trainer.config import Config
from trainer.runtime.ranks import ALONE, Ranks, T
from trainer.train.latent_scale import choose_scale

FIRST_BATCH = "diffusion.latent_scale=first_batch"


@dataclass(frozen=True, slots=True)
class Recorded(Ranks):
    """A rank that is asked after those before it; the last one sees the values of all."""

    values: list[Any] = field(default_factory=list[Any])

    @override
    def gather(self, value: T) -> list[T]:
        self.values.append(value)
        return self.values


def config_of(*options: str) -> Config:
    return load_config(["+experiment=emoji", *NETWORKS, *RUN, *options])


def factor_of(scale: LatentScale) -> float:
    assert scale.is_factor
    return 1 / scale.values["std"][0]


def first_batch_scale(data: DataConfig, world: int, micro_batch: int) -> LatentScale:
    """The scale that the last of some ranks finds."""
    config, values = config_of(FIRST_BATCH), list[Any]()
    scales = [
        choose_scale(
            config,
            Recorded(rank, world, torch.device("cpu"), values=values),
            latents(data, rank=rank, world=world, micro_batch=micro_batch),
            None,
        )
        for rank in range(world)
    ]
    return scales[-1]


def test_the_first_batch_has_deviation_1_on_any_number_of_ranks(latent_set: DataSet) -> None:
    data = latent_set(samples=40)
    scale = first_batch_scale(data, 1, 8)
    for world, micro_batch in ((1, 1), (2, 2), (4, 1)):
        assert first_batch_scale(data, world, micro_batch).values == scale.values
    (batch,) = take(latents(data), 1)
    mean, log_variance = batch.arrays["moments"].double().unbind(1)
    noise = torch.randn(10_000, *mean.shape, dtype=torch.float64)
    drawn = mean + (0.5 * log_variance).exp() * noise
    assert scale.normalise(drawn).std().item() == pytest.approx(1, rel=2e-3)
    torch.testing.assert_close(scale.normalise(mean), factor_of(scale) * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.denormalise(scale.normalise(mean)), mean)


def test_a_factor_is_that_of_the_option(latent_set: DataSet) -> None:
    options = ["diffusion.latent_scale=factor", "diffusion.scaling_factor=0.18215"]
    scale = choose_scale(config_of(*options), ALONE, latents(latent_set()), None)
    assert factor_of(scale) == pytest.approx(0.18215)
    assert len(scale.values["std"]) == 4


@pytest.mark.parametrize("scaling", ["auto", "channels"])
def test_channels_have_the_statistics_of_the_data_set(latent_set: DataSet, scaling: str) -> None:
    config, stream = config_of(f"diffusion.latent_scale={scaling}"), latents(latent_set())
    info = stream.manifest.latents
    assert info is not None
    info.mean[:], info.std[:] = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    assert choose_scale(config, ALONE, stream, None).values == {"mean": info.mean, "std": info.std}


def saved_model(folder: Path, **options: Any) -> Path:
    """A first stage as diffusers saves it, beside the folder of a U-Net."""
    networks: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 8}
    diffusers.AutoencoderKL(**networks, **options).save_pretrained(folder / "vae")
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def imported(data: DataSet, unet: Path, stage: Path | str = "", told: float | None = None) -> float:
    config = config_of(f"unet.weights={unet}", f"autoencoder.weights={stage}")
    return factor_of(choose_scale(config, ALONE, latents(data()), told))


def test_a_u_net_of_diffusers_keeps_the_factor_of_its_first_stage(
    latent_set: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = saved_model(tmp_path / "theirs", scaling_factor=0.5)
    assert imported(latent_set, unet) == 0.5
    file = tmp_path / "theirs" / "vae" / "config.json"
    assert f"latents are multiplied by 0.5: scaling_factor in {file}\n" in capsys.readouterr().out
    elsewhere = tmp_path / "unet.safetensors"
    assert imported(latent_set, elsewhere, file.with_name("weights.safetensors")) == 0.5
    # written by diffusers before 0.8: Stable Diffusion 1
    content = json.loads(file.read_text())
    del content["scaling_factor"]
    file.write_text(json.dumps(content))
    assert imported(latent_set, unet) == diffusers.AutoencoderKL().config.scaling_factor


def test_a_file_of_compvis_may_tell_its_own_factor(latent_set: DataSet, tmp_path: Path) -> None:
    unet = saved_model(tmp_path, scaling_factor=0.5)
    assert imported(latent_set, unet, told=2.0) == 2.0


def test_a_u_net_without_a_known_factor_is_said(
    latent_set: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(f"unet.weights={tmp_path / 'unet.safetensors'}")
    choose_scale(config, ALONE, latents(latent_set()), None)
    assert "unet.weights: no file tells the scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"unet\.weights: .*config\.json cannot be read: JSON"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": 0}', r"is 0, which is no factor"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": "a"}', r"is 'a', which is no factor"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": NaN}', r"is nan, which is no factor"),
    ],
)
def test_a_factor_that_cannot_be_is_refused(
    content: str, words: str, latent_set: DataSet, tmp_path: Path
) -> None:
    unet = saved_model(tmp_path)
    (tmp_path / "vae" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        imported(latent_set, unet)


def test_a_factor_that_is_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scaling_factor=2\.0 is not read with .*=first_batch"):
        config_of(FIRST_BATCH, "diffusion.scaling_factor=2")
