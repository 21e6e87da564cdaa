"""The numbers, from the same image files and weights, against torch-fidelity and by definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.support.inception import inception_weights
from trainer.config import EvalConfig, Features, Metric
from trainer.metrics.compare import compare
from trainer.metrics.feature_set import FeatureCollector, FeatureSet, batches
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.image_folder import ImageFolder
from trainer.metrics.inception import InceptionV3
from trainer.metrics.mmd import cmmd, kid
from trainer.metrics.precision_recall import precision_recall
from trainer.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CONFIG = EvalConfig(
    metrics=[Metric.frechet, Metric.kid, Metric.precision_recall, Metric.inception_score],
    kid_subset_size=12,
    batch_size=5,
)


def write_images(folder: Path, seed: int, count: int) -> Path:
    """Smooth random pictures, of more contrast with a larger seed."""
    folder.mkdir()
    torch.manual_seed(seed)
    coarse = (torch.rand(count, 3, 6, 6) - 0.5) * (150 + 60 * seed) + 128
    pixels = F.interpolate(coarse, (48, 48), mode="bilinear").clamp(0, 255).to(torch.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.png")
    return folder


def features_of(extractor: FeatureExtractor, folder: Path) -> FeatureSet:
    images = ImageFolder(str(folder), 48, "eval.images")
    collector = FeatureCollector(extractor, ALONE, keeps_rows=True)
    for batch in images.read(batches(len(images), CONFIG.batch_size, ALONE)):
        collector.update(batch)
    return collector.finish()


def test_metrics_are_torch_fidelitys_of_the_same_files_and_weights(tmp_path: Path) -> None:
    weights = inception_weights(tmp_path / "weights.pth", seed=0)
    samples = write_images(tmp_path / "samples", 0, 15)
    reference = write_images(tmp_path / "reference", 1, 13)
    oracle = torch_fidelity.calculate_metrics(
        input1=str(samples),
        input2=str(reference),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=12,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        cache=False,
    )
    extractor = InceptionV3(str(weights))
    found = [features_of(extractor, folder) for folder in (samples, reference)]
    values = compare(CONFIG, extractor, *found)
    expected = {
        "fd_inception": oracle["frechet_inception_distance"],
        "kid_inception": oracle["kernel_inception_distance_mean"],
        "kid_inception_std": oracle["kernel_inception_distance_std"],
        "precision_inception": oracle["precision"],
        "recall_inception": oracle["recall"],
        "inception_score": oracle["inception_score_mean"],
        "inception_score_std": oracle["inception_score_std"],
    }
    # KID subtracts means of kernel values near 1.25 in float32, rounded there to 1.2e-7.
    # That is 0.1 % of this mean and 1 % of this deviation; other subsets change it by several.
    rounding = {"kid_inception": 1.2e-7, "kid_inception_std": 1.2e-7}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-3, abs=rounding.get(name)), name
    assert values.keys() == expected.keys()
    assert 0 < values["recall_inception"] < 1
    assert 0 < values["precision_inception"] < 1
    assert values["inception_score"] > 1.05


def test_metrics_are_of_the_extractors_that_they_are_defined_on() -> None:
    rows = torch.randn(20, 3)
    collector = FeatureCollector(Raw(), ALONE, keeps_rows=True)
    collector.update(rows.to(torch.uint8))
    found = collector.finish()
    config = replace(CONFIG, metrics=list(Metric))
    assert set(compare(config, Raw(), found, found)) == {
        "fd_dinov2",
        "kid_dinov2",
        "kid_dinov2_std",
        "precision_dinov2",
        "recall_dinov2",
    }
    with pytest.raises(ValueError, match=r"eval\.kid_subset_size=21 is over the 20"):
        compare(replace(config, kid_subset_size=21), Raw(), found, found)


class Raw(FeatureExtractor):
    """Features are the images themselves."""

    def __init__(self) -> None:
        super().__init__(Features.dinov2, 3, torch.nn.Linear(1, 1), resize="none")

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999), n=st.integers(4, 9), m=st.integers(4, 9))
def test_precision_and_recall_are_those_of_the_definition(seed: int, n: int, m: int) -> None:
    draws = np.random.default_rng(seed)
    samples, real = draws.normal(size=(n, 3)), 1.5 * draws.normal(size=(m, 3))

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        count = 0
        for point in points:
            for centre in centres:
                others = sorted(np.linalg.norm(centres - centre, axis=1))
                if np.linalg.norm(point - centre) <= others[3]:
                    count += 1
                    break
        return count / len(points)

    found = precision_recall(*(torch.from_numpy(x).float() for x in (samples, real)))
    assert found == pytest.approx((inside(samples, real), inside(real, samples)))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999), n=st.integers(2, 9), m=st.integers(2, 9))
def test_cmmd_is_that_of_the_definition(seed: int, n: int, m: int) -> None:
    draws = np.random.default_rng(seed)
    x, y = draws.normal(size=(n, 16)), draws.normal(size=(m, 16)) + 0.2
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y)]

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) @ (p - q)) / 200) for q in b] for p in a]))

    x, y = unit
    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    found = cmmd(*(torch.from_numpy(7 * rows).float() for rows in unit))
    assert found == pytest.approx(expected, abs=1e-4)


def test_kid_of_whole_sets_is_the_unbiased_mmd_of_the_cubic_kernel() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(10, 5).double(), 1.3 * torch.randn(10, 5).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 5 + 1) ** 3

    within = [(k.sum() - k.trace()) / 90 for k in (kernel(x, x), kernel(y, y))]
    expected = float(sum(within) - 2 * kernel(x, y).mean())
    mean, deviation = kid(x, y, 10)
    assert mean == pytest.approx(expected)
    assert deviation == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(0, 40), size=st.integers(1, 7), world=st.integers(1, 5))
def test_rounds_put_every_image_in_its_place(count: int, size: int, world: int) -> None:
    shares = [batches(count, size, Ranks(r, world, torch.device("cpu"))) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    rounds = zip(*shares, strict=True)
    in_order = [number for one in rounds for batch in one for number in batch]
    assert in_order == list(range(count))
    alone = [batch for batch in batches(count, size, ALONE) if batch]
    assert sorted(b.start for share in shares for b in share if b) == [b.start for b in alone]


def test_image_files_of_any_size_come_in_order_and_bad_ones_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 0, 9)
    Image.new("RGB", (96, 48), (255, 0, 0)).save(folder / "004.png")
    images = ImageFolder(str(folder), 48, "eval.images")
    read = list(images.read([range(0, 4), range(4, 8), range(8, 9), range(9, 9)]))
    assert [None if batch is None else len(batch) for batch in read] == [4, 4, 1, None]
    assert read[1] is not None
    assert read[1][0].flatten(1).tolist() == [[255] * 2304, [0] * 2304, [0] * 2304]
    with Image.open(folder / "003.png") as image:
        expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert read[0] is not None
    assert torch.equal(read[0][3], expected)
    (folder / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(ValueError, match=r"eval\.images: .*007\.png: image cannot be decoded"):
        list(images.read([range(0, 9)]))
    with pytest.raises(ValueError, match=r"eval\.images: no png.* in .*empty"):
        ImageFolder(str(tmp_path / "empty"), 48, "eval.images")
