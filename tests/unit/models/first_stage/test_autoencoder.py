from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl_divergence

from models.config import AutoencoderConfig, AutoencoderKind
from models.first_stage.autoencoder import (
    AutoencoderKL,
    AutoencoderVQ,
    build_autoencoder,
    fingerprint,
    kl_divergence,
    load_autoencoder,
    sample_posterior,
)
from tests.support.hostile import write_bomb
from tests.support.oracles import (
    assert_same_outputs_and_gradients,
    diffusers_autoencoder,
    load_both_ways,
)
from tests.support.paths import ROOT

Run = Callable[[Tensor], Tensor]
SHIPPED = ROOT / "conf" / "autoencoder"


def small(**options: Any) -> AutoencoderConfig:
    defaults: dict[str, Any] = {
        "block_out_channels": [8, 16],
        "norm_groups": 4,
        "layers_per_block": 1,
    }
    return AutoencoderConfig(**(defaults | options))


def assert_same(
    ours: nn.Module, theirs: Any, run_ours: Run, run_theirs: Run, images: Tensor
) -> None:
    """Outputs in fp32 to 1e-5; gradients in fp64, for in fp32 either's rounding is as large."""
    with torch.no_grad():
        output, expected = run_ours(images), run_theirs(images)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_same_outputs_and_gradients(
        ours.double(), theirs.double(), run_ours, run_theirs, images.double()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mid_attention": False, "latent_channels": 3},
        {"block_out_channels": [8, 16, 16], "layers_per_block": 2, "attention_levels": [1, 2]},
    ],
)
def test_autoencoder_is_diffusers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = small(**options)
    ours, theirs = AutoencoderKL(config), diffusers_autoencoder(config)
    load_both_ways(ours, theirs)
    images = torch.rand(2, 3, 16, 24) * 2 - 1

    def reconstruct_theirs(images: Tensor) -> Tensor:
        posterior = theirs.encode(images).latent_dist
        moments = torch.stack([posterior.mean, posterior.logvar], dim=1)
        return torch.cat([moments.flatten(), theirs.decode(posterior.mean).sample.flatten()])

    def reconstruct_ours(images: Tensor) -> Tensor:
        moments = ours.encode(images)
        return torch.cat([moments.flatten(), ours.decode(moments[:, 0]).flatten()])

    assert_same(ours, theirs, reconstruct_ours, reconstruct_theirs, images)


@pytest.mark.parametrize("options", [{}, {"attention_levels": [1]}])
def test_vq_is_diffusers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = small(kind=AutoencoderKind.vq, latent_channels=3, num_embeddings=32, **options)
    ours, theirs = AutoencoderVQ(config), diffusers_autoencoder(config)
    load_both_ways(ours, theirs)
    images = torch.rand(2, 3, 16, 24) * 2 - 1

    def reconstruct_theirs(images: Tensor) -> Tensor:
        latents = theirs.encode(images).latents
        decoded = theirs.decode(latents)
        return torch.cat([x.flatten() for x in (latents, decoded.sample, decoded.commit_loss)])

    def reconstruct_ours(images: Tensor) -> Tensor:
        latents = ours.encode(images)[:, 0]
        found = ours(images, None)
        return torch.cat([x.flatten() for x in (latents, found.images, found.penalty)])

    assert_same(ours, theirs, reconstruct_ours, reconstruct_theirs, images)


def test_vq_latents_are_sampled_as_they_are_and_quantised_by_the_decoder() -> None:
    autoencoder = AutoencoderVQ(small(kind=AutoencoderKind.vq, num_embeddings=16))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = autoencoder.encode(images)
    latents = sample_posterior(moments, torch.randn_like(moments[:, 0]))
    torch.testing.assert_close(latents, moments[:, 0], rtol=0, atol=2e-6)
    found = autoencoder(images, None)
    torch.testing.assert_close(autoencoder.decode(moments[:, 0]), found.images)
    codes = autoencoder.quantize.embedding.weight[found.codes].movedim(-1, 1)
    assert (codes - moments[:, 0]).abs().max() > 1e-3
    torch.testing.assert_close(autoencoder.decode(codes), found.images, rtol=1e-4, atol=1e-5)


def test_kl_reconstructs_from_the_posterior() -> None:
    autoencoder = AutoencoderKL(small())
    images, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    moments = autoencoder.encode(images)
    found = autoencoder(images, noise)
    torch.testing.assert_close(
        found.images, autoencoder.decode(sample_posterior(moments, noise)), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.penalty, kl_divergence(moments).mean())
    assert found.codes is None
    torch.testing.assert_close(
        autoencoder(images, None).images, autoencoder.decode(moments[:, 0]), rtol=1e-4, atol=1e-6
    )


def shipped(name: str) -> AutoencoderConfig:
    options = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    kind = AutoencoderKind(options.pop("kind", "kl"))
    return AutoencoderConfig(kind=kind, **options)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("kl_f4", 55_312_063, 204),
        ("kl_f8", 83_653_863, 248),
        ("kl_f16", 69_610_963, 342),
        ("kl_f32", 103_880_131, 436),
        ("vq_f4", 55_322_782, 205),
        ("vq_f4_no_attention", 53_219_486, 185),
        ("vq_f8", 67_717_295, 299),
        ("vq_f16", 69_593_371, 343),
    ],
)
def test_shipped_first_stages_have_the_published_counts(
    name: str, parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        autoencoder = build_autoencoder(shipped(name))
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == parameters
    assert len(autoencoder.state_dict()) == tensors


def test_attention_at_a_level_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"^autoencoder.attention_levels has 2, .* levels 0 to 1"):
        AutoencoderKL(small(attention_levels=[1, 2]))


def test_shapes_and_downsampling() -> None:
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
def test_the_log_variance_is_clamped_and_the_mean_is_not(bias: float, log_variance: float) -> None:
    autoencoder = AutoencoderKL(small())
    with torch.no_grad():
        autoencoder.get_parameter("quant_conv.bias").fill_(bias)
    mean, found = autoencoder.encode(torch.zeros(1, 3, 8, 8)).unbind(1)
    assert (found == log_variance).all()
    assert mean.abs().min() > 900


def test_posterior_agrees_with_diffusers_and_torch() -> None:
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
def test_weights_load_as_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    autoencoder = AutoencoderKL(small())
    loaded = load_autoencoder(small(weights=saved(tmp_path / "w.safetensors", autoencoder, dtype)))
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, autoencoder.state_dict()[name].to(dtype).float())


def test_the_fingerprint_names_the_encoder_and_not_its_file(tmp_path: Path) -> None:
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


def test_missing_weights_are_named(tmp_path: Path) -> None:
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
def test_weights_of_another_network_are_named(
    tmp_path: Path, saved_as: dict[str, Any], loaded_as: dict[str, Any], difference: str
) -> None:
    path = saved(tmp_path / "w.safetensors", AutoencoderKL(small(**saved_as)))
    with pytest.raises(ValueError, match=rf"^autoencoder.weights: .* {difference}"):
        load_autoencoder(small(weights=path, **loaded_as))


def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "w.safetensors", tmp_path / "executed"
    write_bomb(path, target)
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* is no safetensors file"):
        load_autoencoder(small(weights=str(path)))
    assert not target.exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "w.safetensors", AutoencoderKL(small())))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* is damaged"):
        load_autoencoder(small(weights=str(path)))
