import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from trainer.metrics.frechet import frechet_distance
from trainer.metrics.moments import GaussianMoments


def moments_of(features: Tensor) -> GaussianMoments:
    moments = GaussianMoments(features.shape[1])
    moments.update(features)
    return moments


def gaussian(mean: Tensor, cov: Tensor, count: int = 1000) -> GaussianMoments:
    """Moments whose mean and unbiased covariance are exactly these."""
    outer = cov * (count - 1) + count * torch.outer(mean, mean)
    state = {"count": torch.tensor(float(count)), "sum": mean * count, "outer": outer}
    return GaussianMoments.from_state({k: v.double() for k, v in state.items()})


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def torch_fidelity_distance(a: Tensor, b: Tensor) -> float:
    first, second = (fid_features_to_statistics(x.double()) for x in (a, b))
    return fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 24), zeros=st.integers(0, 24))
def test_distance_of_commuting_gaussians_is_the_closed_form(seed: int, d: int, zeros: int) -> None:
    torch.manual_seed(seed)
    basis = rotation(d)
    means = torch.randn(2, d, dtype=torch.float64)
    values = torch.rand(2, d, dtype=torch.float64) * 10
    values[0, :zeros] = 0
    covs = [basis * v @ basis.T for v in values]
    expected = (means[0] - means[1]).square().sum() + (
        values[0].sqrt() - values[1].sqrt()
    ).square().sum()
    distance = frechet_distance(gaussian(means[0], covs[0]), gaussian(means[1], covs[1]))
    assert distance == pytest.approx(float(expected), abs=1e-6)


def test_a_narrow_direction_is_not_taken_for_an_empty_one() -> None:
    # 1e-10 of variance beside 1 moves the distance by 2e-5.
    values = torch.tensor([[1.0, 1e-10], [1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    distance = frechet_distance(*(gaussian(zero, v.diag()) for v in values))
    assert distance == pytest.approx((1 - 1e-5) ** 2, abs=1e-9)


def test_distance_of_a_rotated_gaussian_is_the_closed_form_in_two_dimensions() -> None:
    # tr (AB)^½ of 2x2 matrices is (tr AB + 2 (det AB)^½)^½.
    torch.manual_seed(1)
    factors = torch.randn(2, 2, 2, dtype=torch.float64)
    a, b = factors @ factors.mT
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    expected = a.trace() + b.trace() - 2 * cross
    zero = torch.zeros(2, dtype=torch.float64)
    distance = frechet_distance(gaussian(zero, a), gaussian(zero, b))
    assert distance == pytest.approx(float(expected), abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(2, 48))
def test_distance_is_torch_fidelitys(seed: int, d: int) -> None:
    torch.manual_seed(seed)
    a = torch.randn(4 * d, d).relu()
    b = (1.2 * torch.randn(5 * d, d) + 0.1).relu()
    distance = frechet_distance(moments_of(a), moments_of(b))
    assert distance == pytest.approx(torch_fidelity_distance(a, b), rel=1e-6, abs=1e-6)


def test_fewer_samples_than_features_lose_no_precision() -> None:
    torch.manual_seed(0)
    n, d = 120, 400
    a = torch.randn(n, d, dtype=torch.float64).relu()
    b = (1.1 * torch.randn(n, d, dtype=torch.float64) + 0.1).relu()
    # In sample space the cross term is the nuclear norm of a small product, of full rank.
    centred = [x - x.mean(0) for x in (a, b)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (n - 1)
    traces = sum(float(x.square().sum()) for x in centred) / (n - 1)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + traces - 2 * float(cross)
    distance = frechet_distance(moments_of(a), moments_of(b))
    assert distance == pytest.approx(expected, abs=1e-6)
    assert distance == pytest.approx(torch_fidelity_distance(a, b), abs=1e-3)
    assert frechet_distance(moments_of(a), moments_of(a)) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_moments_do_not_depend_on_batches_or_ranks(sizes: list[int], ranks: int, seed: int) -> None:
    features = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) + 3
    parts = [GaussianMoments(5) for _ in range(ranks)]
    for i, batch in enumerate(features.split(sizes)):
        parts[i % ranks].update(batch)
    for part in parts[1:]:
        for name, total in parts[0].state().items():
            total += part.state()[name]
    whole = parts[0]
    oracle = features.double().numpy()
    assert whole.count == len(features)
    np.testing.assert_allclose(whole.mean.numpy(), oracle.mean(0), atol=1e-12)
    np.testing.assert_allclose(whole.cov.numpy(), np.cov(oracle, rowvar=False), atol=1e-11)


def test_one_sample_and_broken_features_are_refused() -> None:
    good = moments_of(torch.randn(4, 3))
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(good, moments_of(torch.randn(1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(good, moments_of(torch.full((4, 3), torch.nan)))
    with pytest.raises(ValueError, match="3 features with 2"):
        frechet_distance(good, moments_of(torch.randn(4, 2)))
