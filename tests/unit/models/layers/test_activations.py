from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.activations import GEGLULinear, GroupNormModulateSiLU, GroupNormSiLU
from models.layers.linear import Linear, PointwiseConv

Layer = TypeVar("Layer", bound=nn.Module)


def assert_same_with_gradients(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: list[Tensor],
    weights: list[nn.Parameter],
) -> None:
    """Outputs and all gradients, in float64."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
        gradients = torch.autograd.grad((output * probe).sum(), [*leaves, *weights])
        results.append((output, *gradients))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def random(layer: Layer) -> Layer:
    """In float64, with weights of no special values."""
    torch.manual_seed(0)
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_silu_is_torchs_two_layers(
    memory_format: torch.memory_format, groups: int, shifted: bool
) -> None:
    layer = random(GroupNormSiLU(groups, 12, eps=1e-5))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    shift = [torch.randn(3, 12, dtype=torch.float64)] if shifted else []

    def expected(x: Tensor, *shift: Tensor) -> Tensor:
        for each in shift:
            x = x + each[:, :, None, None]
        return F.silu(F.group_norm(x, groups, layer.weight, layer.bias, 1e-5))

    assert_same_with_gradients(layer, expected, [x, *shift], list(layer.parameters()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_modulation_is_torchs_layers(memory_format: torch.memory_format) -> None:
    layer = random(GroupNormModulateSiLU(4, 12, 1e-5))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    scale_and_shift = torch.randn(3, 24, dtype=torch.float64)

    def expected(x: Tensor, scale_and_shift: Tensor) -> Tensor:
        scale, shift = scale_and_shift[:, :, None, None].chunk(2, dim=1)
        normed = F.group_norm(x, 4, layer.weight, layer.bias, 1e-5)
        return F.silu(normed * (1 + scale) + shift)

    assert_same_with_gradients(layer, expected, [x, scale_and_shift], list(layer.parameters()))


def test_geglu_linear_is_values_times_gelu_of_gates_then_linear() -> None:
    layer = random(GEGLULinear(6, 4))
    x = torch.randn(10, 12, dtype=torch.float64)

    def expected(x: Tensor) -> Tensor:
        return F.linear(x[:, :6] * F.gelu(x[:, 6:]), layer.weight, layer.bias)

    assert_same_with_gradients(layer, expected, [x], list(layer.parameters()))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias: bool) -> None:
    layer = random(Linear(6, 4, bias=bias))
    x = torch.randn(10, 6, dtype=torch.float64)
    assert_same_with_gradients(layer, nn.Linear.forward.__get__(layer), [x], [*layer.parameters()])


def test_pointwise_conv_is_a_convolution_of_1x1_images() -> None:
    layer = random(PointwiseConv(6, 4, 1))
    x = torch.randn(10, 6, dtype=torch.float64)

    def expected(x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, None, None], layer.weight, layer.bias).flatten(1)

    assert_same_with_gradients(layer, expected, [x], list(layer.parameters()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (GroupNormSiLU(2, 4), (2, 4, 3, 3)),
        (GEGLULinear(6, 4), (10, 12)),
        (Linear(6, 4), (10, 6)),
    ],
)
def test_frozen_weights_get_no_gradient_and_frozen_inputs_need_none(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    layer.requires_grad_(True)(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (GroupNormSiLU(2, 8), [torch.randn(2, 8, 16, 16)]),
        (GroupNormModulateSiLU(2, 8, 1e-5), [torch.randn(2, 8, 16, 16), torch.randn(2, 16)]),
        (GEGLULinear(64, 4), [torch.randn(256, 128)]),
    ],
)
def test_only_the_input_is_stored_for_the_backward_pass(
    layer: nn.Module, inputs: list[Tensor]
) -> None:
    stored = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(*(x.requires_grad_() for x in inputs))
    assert output.requires_grad
    assert sum(stored.values()) < 1.1 * inputs[0].untyped_storage().nbytes()
