"""Compute the metrics of samples against a reference, by their names in logs."""

from collections.abc import Iterator, Sequence

from models.config.targets import resolve
from trainer.config import EvalConfig
from trainer.config.choices import Metric
from trainer.config.metrics import METRICS, logged_name
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor


def needs_rows(metrics: Sequence[Metric]) -> bool:
    """Return whether a metric needs the features of each image, not only mean and covariance."""
    return any(METRICS[metric].needs_rows for metric in metrics)


def compare(
    config: EvalConfig, extractor: FeatureExtractor, samples: FeatureSet, reference: FeatureSet
) -> dict[str, float]:
    """Compute the metrics of config.metrics on the features of one extractor.

    extractor: the one that made both sets of features. docs/evaluation.md describes the metrics.
    Raises: ValueError for features that are not finite, or too few images for a metric.
    """
    return dict(_values(config, extractor, samples, reference))


def _values(
    config: EvalConfig, extractor: FeatureExtractor, samples: FeatureSet, reference: FeatureSet
) -> Iterator[tuple[str, float]]:
    for metric in config.metrics:
        entry = METRICS[metric]
        if entry.features in (None, extractor.name):
            found = resolve(entry.compute)(samples, reference, extractor, config)
            for name, value in found.items():
                yield logged_name(metric, name, extractor.name), value
