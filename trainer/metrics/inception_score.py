"""Inception score: how sure a classifier is of each image, and how varied its answers are."""

from torch import Tensor

SPLITS = 10


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over 10 splits of exp E KL(p(y|x) ‖ p(y)).

    Salimans et al. 2016, section 4; by torch-fidelity's function, with its shuffle.
    logits: [N, classes]. Raises ValueError for fewer images than splits.
    """
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    if len(logits) < SPLITS:
        raise ValueError(f"an inception score needs {SPLITS} images or more, not {len(logits)}")
    found = isc_features_to_metric(logits, splits=SPLITS)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
