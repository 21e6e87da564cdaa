import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.config import FirstStageLossConfig, PerceptualFeatures
from models.first_stage.loss import (
    ReconstructionError,
    adaptive_weight,
    convolution_weight_gradient,
    negative_log_likelihood,
    with_gradient,
)


def test_the_learned_variance_settles_at_the_error() -> None:
    error, log_variance = torch.tensor(0.3), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([log_variance], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        negative_log_likelihood(error, log_variance).backward()
        optimizer.step()
    assert log_variance.item() == pytest.approx(math.log(0.3), abs=1e-5)


def test_a_scalar_is_given_a_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    gradient = torch.randn(3, 4)
    scalar = with_gradient(torch.tensor(2.5), x, gradient)
    scalar.backward()
    assert scalar.item() == 2.5
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)
    broken = gradient.clone()
    broken[0, 0] = float("nan")
    assert not with_gradient(torch.tensor(2.5), x, broken).isfinite()


def test_the_gradient_at_a_convolution_is_autograds() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    inputs, gradient = torch.randn(2, 4, 6, 7), torch.randn(2, 3, 6, 7)
    (layer(inputs) * gradient).sum().backward()
    assert layer.weight.grad is not None
    found = convolution_weight_gradient(inputs, layer, gradient)
    torch.testing.assert_close(found, layer.weight.grad)


def test_the_weight_balances_two_gradients_within_bounds() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(one, other).item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(one, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), other).item() == 0


def test_the_error_is_the_weighted_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    images, others = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    config = FirstStageLossConfig(
        l1_weight=0.5,
        l2_weight=2.0,
        perceptual_weight=3.0,
        perceptual_features=PerceptualFeatures.efficientnet_lite0,
    )
    network = ReconstructionError(config)
    error, parts = network(images, others)
    assert network.perceptual is not None
    perceptual = network.perceptual(images, others).mean()
    expected = 0.5 * F.l1_loss(others, images) + 2 * F.mse_loss(others, images) + 3 * perceptual
    torch.testing.assert_close(error, expected)
    assert sorted(parts) == ["l1", "l2", "perceptual"]
    without = ReconstructionError(FirstStageLossConfig(perceptual_weight=0.0))
    assert without.perceptual is None
    torch.testing.assert_close(without(images, others)[0], F.l1_loss(others, images))
