import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.activations import GEGLULinear
from models.layers.group_norm import GroupNormModulateSiLU, GroupNormSiLU
from models.layers.linear import Linear, PointwiseConv
from tests.support.layers import assert_same_with_gradients, random


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
