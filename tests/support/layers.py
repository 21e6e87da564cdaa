"""Layers in float64, compared with others."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

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
