"""The loss of a first stage (Esser et al. 2021; Rombach et al. 2022, appendix G)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import FirstStageLossConfig
from models.first_stage.autoencoder import Autoencoder, Reconstruction
from models.first_stage.perceptual import PerceptualDistance, build_perceptual

WEIGHT_EPSILON = 1e-4
MOST_WEIGHT = 1e4


class LikelihoodFirstStage(nn.Module):
    """A first stage with the learned log-variance of its reconstruction error."""

    def __init__(self, autoencoder: Autoencoder, *, learn_log_variance: bool) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.log_variance = nn.Parameter(torch.zeros(1)) if learn_log_variance else None

    def forward(self, images: Tensor, noise: Tensor | None) -> tuple[Reconstruction, Tensor]:
        """Return the first stage's outputs, and the log-variance, a scalar: 0 if it is not learned.

        images: [B, 3, H, W] in [-1, 1]; noise: [B, C, h, w] standard normal, or None.
        """
        learned = self.log_variance
        log_variance = images.new_zeros(()) if learned is None else learned.sum()
        return self.autoencoder(images, noise), log_variance


class ReconstructionError(nn.Module):
    """Weighted sum of the L1, L2 and perceptual error, each a mean over the batch.

    L1 and L2 are means over pixels and channels, too.

    Raises: ValueError or FileNotFoundError if the perceptual network is missing.
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
        """Return the error and its parts without weights, by name: l1, l2, perceptual; scalars.

        images, reconstructions: [B, 3, H, W] in [-1, 1]; gradients go to the reconstructions.
        """
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
    """Return error / exp(log_variance) + log_variance, a scalar; both inputs are scalars.

    The negative log-likelihood of an error with a learned variance, without its constant (Dai and
    Wipf 2019).
    """
    return error * torch.exp(-log_variance) + log_variance


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Return `value` with a given gradient: the backward pass gives x `gradient`.

    value: a scalar; x, gradient: of one shape. Returns a scalar; NaN if the gradient is not finite.
    """
    # the product gives the gradient; subtracting its value leaves 0, or NaN
    product = (x * gradient.detach()).sum()
    return value.detach() + (product - product.detach())


def convolution_weight_gradient(inputs: Tensor, layer: nn.Conv2d, gradient: Tensor) -> Tensor:
    """Compute the gradient of a layer's weight, fp32, of the weight's shape.

    inputs: [B, C, h, w] of the layer; gradient: of its outputs, [B, C', h', w'].
    """
    weight = layer.weight.detach().float().requires_grad_()
    with torch.enable_grad():
        outputs = F.conv2d(
            inputs.detach().float(), weight, stride=layer.stride, padding=layer.padding
        )
    return torch.autograd.grad(outputs, weight, gradient.float())[0]


def adaptive_weight(error_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Return the weight that makes both gradients equally large (Esser et al. 2021, equation 7).

    error_gradient, adversarial_gradient: at the weight of the decoder's last layer. Returns a
    scalar in [0, 10000].
    """
    ratio = _norm(error_gradient) / (_norm(adversarial_gradient) + WEIGHT_EPSILON)
    return ratio.clamp(0.0, MOST_WEIGHT)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()
