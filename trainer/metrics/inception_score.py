"""Inception score: confidence of a classifier in each image, and diversity of its predictions."""

from typing import Any

from torch import Tensor

from trainer.config import EvalConfig
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.inception import InceptionV3

SPLITS = 10


def compute(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `inception_score` and `inception_score_std` from the samples alone."""
    assert isinstance(extractor, InceptionV3)
    mean, deviation = inception_score(extractor.logits(samples.rows.to(extractor.device)).cpu())
    return {"inception_score": mean, "inception_score_std": deviation}


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Compute exp(E KL(p(y|x) ‖ p(y))); return mean and standard deviation over 10 splits.

    Salimans et al. 2016, section 4, by torch-fidelity's function with its shuffle.
    logits: [N, classes]. The score is a plain number from 1 to `classes`; higher is better.
    Raises: ValueError for fewer images than splits.
    """
    from torch_fidelity import metric_isc

    library: Any = metric_isc  # without type stubs

    if len(logits) < SPLITS:
        raise ValueError(f"an inception score needs {SPLITS} images or more, not {len(logits)}")
    found: dict[str, float] = library.isc_features_to_metric(logits, splits=SPLITS)
    return found[library.KEY_METRIC_ISC_MEAN], found[library.KEY_METRIC_ISC_STD]
