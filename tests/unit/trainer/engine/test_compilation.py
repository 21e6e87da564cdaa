"""Dynamo compiles each shape of a block once, without breaks; Inductor itself is a campaign."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.config import UNetConfig
from models.layers import group_norm
from models.layers.attention import sdpa_attention
from models.layers.blocks import ResBlock, use_attention
from models.layers.transformer import SpatialTransformer
from models.unet import UNet2DCondition
from tests.support.cudnn_layouts import channels_last
from trainer.engine.compilation import compile_blocks

CONFIG = UNetConfig(
    block_out_channels=[8, 16],
    attention=[False, True],
    heads=[1, 2],
    context_dim=8,
    norm_groups=4,
    layers_per_block=1,
)
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)


def network() -> UNet2DCondition:
    torch.manual_seed(0)
    unet = UNet2DCondition(CONFIG)
    use_attention(unet, sdpa_attention)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def trained(unet: nn.Module, latents: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of a step."""
    output = unet(latents, *INPUTS[1:])
    return output, *torch.autograd.grad(output.square().mean(), [*unet.parameters()])


def distinct_calls(unet: nn.Module) -> set[Any]:
    """What the blocks are called with: class, widths, and shape of x."""
    calls: set[Any] = set()

    def note(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.add((type(block), inputs[0].shape, output.shape))

    for block in unet.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            block.register_forward_hook(note)
    trained(unet, INPUTS[0])
    return calls


def compiled_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> UNet2DCondition:
    compile_module: Callable[..., None] = nn.Module.compile

    def compile_by_backend(module: nn.Module, **options: Any) -> None:
        compile_module(module, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_by_backend)
    torch.compiler.reset()
    counters.clear()
    unet = network()
    compile_blocks(unet)
    return unet


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.campaign)]
)
@pytest.mark.parametrize("by_operator", [False, True])
def test_a_run_with_evaluation_compiles_each_shape_once_without_breaks(
    backend: str, by_operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """by_operator: the normalisation of a GPU, on channels-last latents."""
    latents = INPUTS[0]
    if by_operator:
        monkeypatch.setattr(group_norm, "can_normalise", channels_last)
        latents = latents.contiguous(memory_format=torch.channels_last)
    shapes = distinct_calls(network())
    expected = trained(network(), latents)
    unet = compiled_by(backend, monkeypatch)
    for found, other in zip(trained(unet, latents), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    first = counters["stats"]["unique_graphs"]
    assert first == len(shapes)
    with torch.inference_mode():  # as an evaluation does, with a network of its own
        network()(latents, *INPUTS[1:])
    for _ in range(2):
        trained(unet, latents)
    assert counters["stats"]["unique_graphs"] == first
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
