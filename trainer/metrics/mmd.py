"""Maximum mean discrepancy (MMD) of features: KID and CMMD (Gretton et al. 2012)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.config import EvalConfig
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.features import FeatureExtractor

KID_SUBSETS = 100
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0
BLOCK = 4096
"""Most rows of a kernel matrix that are in memory at once."""


def compute_kid(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `kid` and `kid_std`, the metric `kid`."""
    mean, deviation = kid(samples.rows, reference.rows, config.kid_subset_size)
    return {"kid": mean, "kid_std": deviation}


def compute_cmmd(
    samples: FeatureSet, reference: FeatureSet, extractor: FeatureExtractor, config: EvalConfig
) -> dict[str, float]:
    """Compute `cmmd`, the metric `cmmd`."""
    # on the device of the extractor: a GPU computes the matrix products much faster
    device = extractor.device
    return {"cmmd": cmmd(samples.rows.to(device), reference.rows.to(device))}


def kid(samples: Tensor, reference: Tensor, subset_size: int) -> tuple[float, float]:
    """Compute the kernel Inception distance; return mean and standard deviation over subsets.

    Bińkowski et al. 2018, section 4: the unbiased squared MMD with the kernel (xᵀy / D + 1)³, over
    KID_SUBSETS random subsets, by torch-fidelity's function. Not multiplied by 1000.
    samples: [N, D]; reference: [M, D], on the CPU; subset_size: images in a subset.
    Raises: ValueError if a subset is larger than N or M.
    """
    from torch_fidelity import metric_kid

    library: Any = metric_kid  # without type stubs

    least = min(len(samples), len(reference))
    if subset_size > least:
        raise ValueError(
            f"eval.kid_subset_size={subset_size} is over the {least} images that there are: "
            f"lower it, or raise eval.num_samples"
        )
    found: dict[str, float] = library.kid_features_to_metric(
        samples, reference, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    return found[library.KEY_METRIC_KID_MEAN], found[library.KEY_METRIC_KID_STD]


def cmmd(samples: Tensor, reference: Tensor) -> float:
    """Compute the CLIP maximum mean discrepancy (Jayasumana et al. 2024, section 4), times 1000.

    The biased squared MMD of normalised embeddings, with the Gaussian kernel
    exp(-|x - y|² / 2σ²), σ = 10. samples: [N, D]; reference: [M, D]; any scale of the rows.
    The paper uses the embeddings of CLIP ViT-L/14 at 336 px.
    """
    x, y = (F.normalize(rows.float(), dim=1) for rows in (samples, reference))
    # k - 1 instead of k: the sum is the same, and k is so near to 1 that it would lose digits
    within = _mean_kernel_less_one(x, x) + _mean_kernel_less_one(y, y)
    return CMMD_SCALE * (within - 2 * _mean_kernel_less_one(x, y))


def _mean_kernel_less_one(x: Tensor, y: Tensor) -> float:
    """Average exp(-|x - y|² / 2σ²) - 1 over all pairs of normalised rows, [N, D] and [M, D]."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), BLOCK):
        squared_distances = 2 - 2 * (x[start : start + BLOCK] @ y.T).double()
        total += squared_distances.div_(-2 * CMMD_BANDWIDTH**2).expm1_().sum()
    return float(total) / (len(x) * len(y))
