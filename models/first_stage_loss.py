"""What a first stage minimises (Esser et al. 2021; Rombach et al. 2022, appendix G)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Reconstruction
from models.config import FirstStageLossConfig
from models.perceptual import PerceptualDistance, build_perceptual

WEIGHT_EPSILON = 1e-4
MOST_WEIGHT = 1e4


class LikelihoodFirstStage(nn.Module):
    """A first stage with what training learns beside it: the log-variance of its error."""

    def __init__(self, autoencoder: Autoencoder, *, learn_log_variance: bool) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.log_variance = nn.Parameter(torch.zeros(1)) if learn_log_variance else None

    def forward(self, images: Tensor, noise: Tensor | None) -> tuple[Reconstruction, Tensor]:
        """As the first stage's, with the log-variance, a scalar that is 0 where none is learned."""
        learned = self.log_variance
        log_variance = images.new_zeros(()) if learned is None else learned.sum()
        return self.autoencoder(images, noise), log_variance


class ReconstructionError(nn.Module):
    """Weighted sum of absolute, squared and perceptual error, each a mean over the batch.

    Raises ValueError or FileNotFoundError where the perceptual network cannot be had.
    """

    def __init__(self, config: FirstStageLossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual: PerceptualDistance | None = None
        if config.perceptual_weight:
            self.perceptual = build_perceptual(
                config.perceptual_features, config.perceptual_weights
            )

    def forward(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both [B, 3, H, W] in [-1, 1] → the error, and its parts by name; differentiable."""
        images, reconstructions = images.float(), reconstructions.float()
        parts = {
            "l1": F.l1_loss(reconstructions, images),
            "l2": F.mse_loss(reconstructions, images),
        }
        error = self.config.l1_weight * parts["l1"] + self.config.l2_weight * parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, reconstructions).mean()
            error = error + self.config.perceptual_weight * parts["perceptual"]
        return error, parts


def negative_log_likelihood(error: Tensor, log_variance: Tensor) -> Tensor:
    """Of an error with a learned variance (Dai and Wipf 2019), but for a constant: scalars."""
    return error * torch.exp(-log_variance) + log_variance


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of this value whose gradient at x is `gradient`, of x's shape."""
    # a product whose value is taken off again, unless it is not finite
    product = (x * gradient.detach()).sum()
    return value.detach() + (product - product.detach())


def convolution_weight_gradient(inputs: Tensor, layer: nn.Conv2d, gradient: Tensor) -> Tensor:
    """Gradient at a layer's weight, fp32, from its inputs and the gradient at its outputs."""
    weight = layer.weight.detach().float().requires_grad_()
    with torch.enable_grad():
        outputs = F.conv2d(
            inputs.detach().float(), weight, stride=layer.stride, padding=layer.padding
        )
    return torch.autograd.grad(outputs, weight, gradient.float())[0]


def adaptive_weight(error_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """How much heavier the adversarial term must be to weigh as much as the error: a scalar.

    Both are gradients at the decoder's last layer (Esser et al. 2021, equation 7).
    """
    ratio = error_gradient.norm() / (adversarial_gradient.norm() + WEIGHT_EPSILON)
    return ratio.clamp(0.0, MOST_WEIGHT)
