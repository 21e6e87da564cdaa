"""Samples against a reference: every metric that was asked for, by its name in the logs."""

from collections.abc import Iterator, Sequence

from trainer.config import EvalConfig, Features, Metric
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.inception import InceptionV3
from trainer.metrics.inception_score import inception_score
from trainer.metrics.mmd import cmmd, kid
from trainer.metrics.precision_recall import precision_recall


def needs_rows(metrics: Sequence[Metric]) -> bool:
    """Whether moments are not enough for one of them."""
    return any(metric is not Metric.frechet for metric in metrics)


def compare(
    config: EvalConfig, extractor: FeatureExtractor, samples: FeatureSet, reference: FeatureSet
) -> dict[str, float]:
    """The metrics of config.metrics on one extractor's features; see docs/evaluation.md.

    Raises ValueError for features that are not finite, or too few images for a metric.
    """
    return dict(_values(config, extractor, samples, reference))


def _values(
    config: EvalConfig, extractor: FeatureExtractor, samples: FeatureSet, reference: FeatureSet
) -> Iterator[tuple[str, float]]:
    name = extractor.name
    # matrix products are much faster where the extractor runs
    device = next(extractor.parameters()).device
    for metric in config.metrics:
        match metric:
            case Metric.frechet:
                yield f"fd_{name}", frechet_distance(samples.moments, reference.moments)
            case Metric.kid:
                mean, deviation = kid(samples.rows, reference.rows, config.kid_subset_size)
                yield f"kid_{name}", mean
                yield f"kid_{name}_std", deviation
            case Metric.precision_recall:
                rows = samples.rows.to(device), reference.rows.to(device)
                precision, recall = precision_recall(*rows)
                yield f"precision_{name}", precision
                yield f"recall_{name}", recall
            case Metric.inception_score:
                if isinstance(extractor, InceptionV3):
                    logits = extractor.logits(samples.rows.to(device)).cpu()
                    mean, deviation = inception_score(logits)
                    yield "inception_score", mean
                    yield "inception_score_std", deviation
            case Metric.cmmd:
                if name is Features.open_clip:
                    yield "cmmd", cmmd(samples.rows.to(device), reference.rows.to(device))
