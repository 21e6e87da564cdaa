import pytest
import torch
import torch.nn.functional as F

from models.activations import GroupNormSiLU, geglu


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_silu_is_torchs_two_layers_with_gradients(memory_format, groups):
    torch.manual_seed(0)
    layer = GroupNormSiLU(groups, 12, eps=1e-5).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    probe = torch.randn_like(x)

    def run(function):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf)
        return output, *torch.autograd.grad(
            (output * probe).sum(), [leaf, layer.weight, layer.bias]
        )

    expected = run(lambda x: F.silu(F.group_norm(x, groups, layer.weight, layer.bias, 1e-5)))
    for ours, theirs in zip(run(layer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_group_norm_silu_gives_no_gradient_to_frozen_weights():
    layer = GroupNormSiLU(2, 4).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_geglu_is_values_times_gelu_of_gates_with_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = x[..., :6] * F.gelu(x[..., 6:])
    torch.testing.assert_close(geglu(x), expected)
    (grad,) = torch.autograd.grad((geglu(x) * probe).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * probe).sum(), x)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (GroupNormSiLU(2, 8), torch.randn(2, 8, 16, 16)),
        (geglu, torch.randn(2, 64, 64)),
    ],
)
def test_only_the_input_is_stored_for_the_backward_pass(layer, x):
    x.requires_grad_()
    stored = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    assert output.requires_grad
    assert sum(stored.values()) < 1.1 * x.untyped_storage().nbytes()
