"""Maximum mean discrepancies of features: KID and CMMD."""

import torch
from torch import Tensor
from torch.nn import functional as F

KID_SUBSETS = 100
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0
BLOCK = 4096
"""Rows of a kernel matrix that are in memory at once."""


def kid(samples: Tensor, reference: Tensor, subset_size: int) -> tuple[float, float]:
    """Kernel Inception distance (Bińkowski et al. 2018, section 4): mean and deviation of subsets.

    The unbiased squared MMD of the kernel (xᵀy / D + 1)³, over KID_SUBSETS random subsets that are
    those of torch-fidelity, whose function this is. samples: [N, D]; reference: [M, D].
    Raises ValueError where a subset is larger than N or M.
    """
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    least = min(len(samples), len(reference))
    if subset_size > least:
        raise ValueError(
            f"eval.kid_subset_size={subset_size} is over the {least} images that there are: "
            f"lower it, or raise eval.num_samples"
        )
    found = kid_features_to_metric(
        samples, reference, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def cmmd(samples: Tensor, reference: Tensor) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, section 4), times 1000.

    The biased squared MMD of the Gaussian kernel of bandwidth 10 between normalised embeddings.
    samples: [N, D]; reference: [M, D]; the published protocol has those of CLIP ViT-L/14 at 336 px.
    """
    x, y = (F.normalize(rows.float(), dim=1) for rows in (samples, reference))
    # k - 1 instead of k, which would cancel in all three terms but for rounding
    within = _mean_kernel_less_one(x, x) + _mean_kernel_less_one(y, y)
    return CMMD_SCALE * (within - 2 * _mean_kernel_less_one(x, y))


def _mean_kernel_less_one(x: Tensor, y: Tensor) -> float:
    """Mean over all pairs of exp(-|x - y|² / 2σ²) - 1 of normalised rows."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(BLOCK):
        squared_distances = 2 - 2 * (rows @ y.T).double()
        total += squared_distances.div_(-2 * CMMD_BANDWIDTH**2).expm1_().sum()
    return float(total) / (len(x) * len(y))
