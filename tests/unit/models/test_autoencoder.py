from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl_divergence

from models.autoencoder import (
    AutoencoderKL,
    fingerprint,
    kl_divergence,
    load_autoencoder,
    sample_posterior,
)
from models.config import AutoencoderConfig
from tests.unit.models.hostile import write_bomb
from tests.unit.models.oracles import (
    assert_same_outputs_and_gradients,
    diffusers,
    load_both_ways,
)


def small(**options) -> AutoencoderConfig:
    defaults = {"block_out_channels": [8, 16], "norm_groups": 4, "layers_per_block": 1}
    return AutoencoderConfig(**(defaults | options))


def diffusers_autoencoder(config: AutoencoderConfig) -> Any:
    levels = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        mid_block_add_attention=config.mid_attention,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mid_attention": False, "latent_channels": 3},
        {"block_out_channels": [8, 16, 16], "layers_per_block": 2},
    ],
)
def test_autoencoder_is_diffusers(options):
    config = small(**options)
    ours, theirs = AutoencoderKL(config), diffusers_autoencoder(config)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 24) * 2 - 1

    def reconstruct_theirs(images):
        posterior = theirs.encode(images).latent_dist
        moments = torch.stack([posterior.mean, posterior.logvar], dim=1)
        return torch.cat([moments.flatten(), theirs.decode(posterior.mean).sample.flatten()])

    def reconstruct_ours(images):
        moments = ours.encode(images)
        return torch.cat([moments.flatten(), ours.decode(moments[:, 0]).flatten()])

    assert_same_outputs_and_gradients(ours, theirs, reconstruct_ours, reconstruct_theirs, images)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        pytest.param({}, 83_653_863, id="KL-f8"),
        pytest.param(
            {"block_out_channels": [128, 256, 512], "latent_channels": 3}, 55_312_063, id="KL-f4"
        ),
    ],
)
def test_parameter_counts_of_published_models(options, parameters):
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderConfig(**options))
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == parameters


def test_shapes_and_downsampling():
    config = small(block_out_channels=[8, 8, 16], latent_channels=5)
    autoencoder = AutoencoderKL(config)
    moments = autoencoder.encode(torch.zeros(2, 3, 16, 32))
    assert moments.shape == (
        2,
        2,
        5,
        16 // config.downsample_factor,
        32 // config.downsample_factor,
    )
    assert autoencoder.decode(moments[:, 0]).shape == (2, 3, 16, 32)


@pytest.mark.parametrize(("bias", "log_variance"), [(1e3, 20.0), (-1e3, -30.0)])
def test_the_log_variance_is_clamped_and_the_mean_is_not(bias, log_variance):
    autoencoder = AutoencoderKL(small())
    with torch.no_grad():
        autoencoder.get_parameter("quant_conv.bias").fill_(bias)
    mean, found = autoencoder.encode(torch.zeros(1, 3, 8, 8)).unbind(1)
    assert (found == log_variance).all()
    assert mean.abs().min() > 900


def test_posterior_agrees_with_diffusers_and_torch():
    torch.manual_seed(0)
    moments = torch.randn(3, 2, 4, 5, 6)
    theirs = DiagonalGaussianDistribution(moments.flatten(1, 2))
    noise = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        sample_posterior(moments, noise), theirs.sample(torch.Generator().manual_seed(7))
    )
    torch.testing.assert_close(kl_divergence(moments), theirs.kl())
    posterior = Normal(moments[:, 0], (0.5 * moments[:, 1]).exp())
    exact = torch_kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(moments), exact)


def saved(path: Path, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.float32) -> str:
    weights = {name: value.to(dtype) for name, value in autoencoder.state_dict().items()}
    save_file(weights, path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_load_as_fp32(tmp_path, dtype):
    autoencoder = AutoencoderKL(small())
    loaded = load_autoencoder(small(weights=saved(tmp_path / "w.safetensors", autoencoder, dtype)))
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, autoencoder.state_dict()[name].to(dtype).float())


def test_the_fingerprint_names_the_encoder_and_not_its_file(tmp_path):
    autoencoder = AutoencoderKL(small())
    first = load_autoencoder(small(weights=saved(tmp_path / "a.safetensors", autoencoder)))
    second = load_autoencoder(small(weights=saved(tmp_path / "b.safetensors", autoencoder)))
    assert fingerprint(first) == fingerprint(second) == fingerprint(autoencoder)
    other_norm = AutoencoderKL(small(norm_groups=2))
    other_norm.load_state_dict(autoencoder.state_dict())
    assert fingerprint(other_norm) != fingerprint(autoencoder)
    with torch.no_grad():
        second.get_parameter("quant_conv.bias")[0] += 1e-6
    assert fingerprint(second) != fingerprint(first)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^autoencoder.weights is empty"):
        load_autoencoder(small())
    with pytest.raises(FileNotFoundError, match=r"^autoencoder.weights: no file at .*w.safe"):
        load_autoencoder(small(weights=str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize(
    ("saved_as", "loaded_as", "difference"),
    [
        ({"latent_channels": 8}, {}, r"its decoder.conv_in.weight is \[16, 8, 3, 3\], not \[16, 4"),
        ({"layers_per_block": 2}, {}, "its decoder.up_blocks.0.resnets.2.conv1.bias has no place"),
        ({}, {"layers_per_block": 2}, "it lacks decoder.up_blocks.0.resnets.2.conv1.bias"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, saved_as, loaded_as, difference):
    path = saved(tmp_path / "w.safetensors", AutoencoderKL(small(**saved_as)))
    with pytest.raises(ValueError, match=rf"^autoencoder.weights: .* {difference}"):
        load_autoencoder(small(weights=path, **loaded_as))


def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path):
    path, target = tmp_path / "w.safetensors", tmp_path / "executed"
    write_bomb(path, target)
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* is no safetensors file"):
        load_autoencoder(small(weights=str(path)))
    assert not target.exists()


def test_a_truncated_file_is_refused(tmp_path):
    path = Path(saved(tmp_path / "w.safetensors", AutoencoderKL(small())))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* is damaged"):
        load_autoencoder(small(weights=str(path)))
