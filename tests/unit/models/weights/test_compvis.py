from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import AutoencoderConfig, AutoencoderKind, UNetConfig
from models.first_stage.autoencoder import build_autoencoder, load_autoencoder
from models.layers.blocks import SpatialAttention
from models.unet import UNet2DCondition
from models.weights.compvis import (
    COMPVIS_FIRST_STAGE,
    COMPVIS_UNET,
    first_stage_places,
    from_compvis,
    load_unet,
    to_compvis,
    unet_places,
)
from tests.support.hostile import write_bomb

KL: dict[str, Any] = {"block_out_channels": [8, 8, 16], "norm_groups": 4, "layers_per_block": 1}
UNET: dict[str, Any] = {
    "block_out_channels": [16, 32, 48],
    "attention": [True, False, True],
    "heads": [2, 4, 6],
    "context_dim": 24,
    "norm_groups": 8,
}
FIRST_STAGES = [
    pytest.param({}, id="KL"),
    pytest.param({"attention_levels": [1, 2], "latent_channels": 6}, id="KL, attention in levels"),
    pytest.param({"mid_attention": False, "layers_per_block": 2}, id="KL, no attention"),
    pytest.param({"kind": AutoencoderKind.vq, "num_embeddings": 32}, id="VQ"),
]
UNETS = [
    pytest.param({}, id="SD 1"),
    pytest.param({"linear_projection": True, "layers_per_block": 1}, id="SD 2"),
    pytest.param({"context_dim": 0, "transformer_depth": 1}, id="unconditional"),
    pytest.param({"context_dim": 0, "resblock_updown": True, "scale_shift_norm": True}, id="LSUN"),
    pytest.param({"transformer_depth": 3, "in_channels": 7}, id="depth 3"),
]


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def first_stage(options: dict[str, Any]) -> tuple[AutoencoderConfig, nn.Module]:
    config = AutoencoderConfig(**(KL | options))
    return config, randomised(build_autoencoder(config))


def compvis_first_stage(network: nn.Module) -> dict[str, Tensor]:
    weights = network.state_dict()
    return to_compvis(weights, first_stage_places(weights))


def unet(options: dict[str, Any]) -> tuple[UNetConfig, nn.Module]:
    config = UNetConfig(**(UNET | options))
    return config, randomised(UNet2DCondition(config))


def compvis_unet(config: UNetConfig, network: nn.Module) -> dict[str, Tensor]:
    weights = network.state_dict()
    return to_compvis(weights, unet_places(weights, config))


def saved(path: Path, weights: dict[str, Tensor], prefix: str = "") -> str:
    save_file({prefix + key: value.contiguous() for key, value in weights.items()}, path)
    return str(path)


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize("options", FIRST_STAGES)
def test_first_stages_come_back_from_compvis_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    config, network = first_stage(options)
    config.weights = saved(tmp_path / "w.safetensors", compvis_first_stage(network))
    assert_same_weights(load_autoencoder(config), network)
    assert "autoencoder.weights" in capsys.readouterr().out


@pytest.mark.parametrize("options", UNETS)
def test_unets_come_back_from_compvis_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    config, network = unet(options)
    path = saved(tmp_path / "w.safetensors", compvis_unet(config, network), COMPVIS_UNET)
    fresh = UNet2DCondition(config)
    assert load_unet(fresh, config, Path(path)) is None
    assert_same_weights(fresh, network)


def test_compvis_first_stages_are_what_diffusers_reads() -> None:
    _, network = first_stage({"block_out_channels": [8, 8, 8, 16], "layers_per_block": 2})
    theirs = {COMPVIS_FIRST_STAGE + k: v for k, v in compvis_first_stage(network).items()}
    assert theirs["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    options = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    read = single_file_utils.convert_ldm_vae_checkpoint(theirs, options)
    expected = network.state_dict()
    assert {k: v for k, v in read.items() if torch.equal(v, expected[k])}.keys() == expected.keys()


@pytest.mark.parametrize("options", [{}, {"linear_projection": True}])
def test_compvis_unets_are_what_diffusers_reads(options: dict[str, Any]) -> None:
    config, network = unet(options)
    theirs = {COMPVIS_UNET + key: value for key, value in compvis_unet(config, network).items()}
    read = single_file_utils.convert_ldm_unet_checkpoint(
        theirs, {"layers_per_block": config.layers_per_block, "class_embed_type": None}
    )
    expected = network.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in read.items())


def test_fused_attention_is_ldms() -> None:
    """The arithmetic of LDM's AttentionBlock on the converted tensors (its QKVAttentionLegacy)."""
    config, network = unet({"context_dim": 0})
    network.double()
    theirs, heads = compvis_unet(config, network), config.heads[-1]
    ours = network.get_submodule("mid_block.attentions.0")
    assert isinstance(ours, SpatialAttention)
    x = torch.randn(2, 48, 3, 4, dtype=torch.float64)
    normed = ours.group_norm(x).flatten(2)
    conv = nn.functional.conv1d
    qkv, out = (f"middle_block.1.{name}" for name in ("qkv", "proj_out"))
    fused = conv(normed, theirs[f"{qkv}.weight"], theirs[f"{qkv}.bias"])
    q, k, v = fused.reshape(2 * heads, 3 * 48 // heads, -1).split(48 // heads, dim=1)
    scale = (48 // heads) ** -0.25
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
    mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(2, 48, -1)
    expected = x + conv(mixed, theirs[f"{out}.weight"], theirs[f"{out}.bias"]).view(x.shape)
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


def test_a_whole_stable_diffusion_file_gives_first_stage_and_averaged_unet(tmp_path: Path) -> None:
    first_config, first = first_stage({})
    config, network = unet({})
    _, average = unet({})
    with torch.no_grad():
        for parameter in average.parameters():
            parameter += 1
    named = compvis_unet(config, average)
    whole = {COMPVIS_UNET + k: v for k, v in compvis_unet(config, network).items()}
    whole |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in named.items()}
    whole |= {COMPVIS_FIRST_STAGE + k: v for k, v in compvis_first_stage(first).items()}
    whole |= {"first_stage_model.loss.logvar": torch.zeros(()), "betas": torch.zeros(10)}
    whole["scale_factor"] = torch.tensor(0.25)  # of a model that scales by the first batch
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": whole, "global_step": 7}, path)

    first_config.weights = str(path)
    assert_same_weights(load_autoencoder(first_config), first)
    fresh = UNet2DCondition(config)
    assert load_unet(fresh, config, path) == 0.25
    assert_same_weights(fresh, average)


def test_diffusers_weights_load_in_half_precision_and_under_their_old_names(tmp_path: Path) -> None:
    config, network = first_stage({})
    old = {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }
    weights = {}
    for name, value in network.state_dict().items():
        for present, before in old.items():
            name = name.replace(f"attentions.0.{present}.", f"attentions.0.{before}.")
        weights[name] = value.half()
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    config.weights = saved(tmp_path / "w.safetensors", weights)
    assert_same_weights(load_autoencoder(config), network.half().float())


def test_another_network_in_compvis_layout_is_named(tmp_path: Path) -> None:
    config, network = first_stage({})
    weights = compvis_first_stage(network)
    weights["decoder.up.0.block.9.conv1.bias"] = torch.zeros(8)
    config.weights = saved(tmp_path / "w.safetensors", weights)
    with pytest.raises(ValueError, match=r"its decoder.up.0.block.9.conv1.bias has no place"):
        load_autoencoder(config)
    del weights["decoder.up.0.block.9.conv1.bias"], weights["encoder.mid.attn_1.q.bias"]
    config.weights = saved(tmp_path / "w.safetensors", weights)
    with pytest.raises(ValueError, match=r"it lacks encoder.mid_block.attentions.0.to_q.bias"):
        load_autoencoder(config)
    path = saved(tmp_path / "u.safetensors", compvis_unet(*unet({})), COMPVIS_UNET)
    wide, network = unet({"block_out_channels": [16, 32, 96]})
    with pytest.raises(ValueError, match=r"^unet.weights: .* is \[48.*\], not \[96"):
        load_unet(network, wide, Path(path))


def test_a_ckpt_that_could_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "w.ckpt", tmp_path / "executed"
    write_bomb(path, target)
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* more than tensors"):
        load_autoencoder(AutoencoderConfig(**KL, weights=str(path)))
    assert not target.exists()


def test_a_truncated_ckpt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.ckpt"
    torch.save({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"^autoencoder.weights: .* is damaged"):
        load_autoencoder(AutoencoderConfig(**KL, weights=str(path)))


@pytest.mark.parametrize("shape", [(5, 3), (3, 4), (12,), (4, 3, 1, 2), (2, 6)])
def test_a_tensor_of_another_shape_keeps_it(shape: tuple[int, ...]) -> None:
    ours = {"conv_in.weight": torch.zeros(4, 3)}
    theirs = {"input_blocks.0.0.weight": torch.zeros(shape)}
    places = unet_places(ours, UNetConfig())
    assert from_compvis(theirs, places, ours)["conv_in.weight"].shape == shape
