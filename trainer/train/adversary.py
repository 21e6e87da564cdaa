"""The discriminator of a first stage, its loss, and the weight of the adversarial term."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.streams.stream import Batch
from models.first_stage.discriminator import PatchDiscriminator, adversarial_loss, hinge_loss
from models.first_stage.loss import adaptive_weight, convolution_weight_gradient, with_gradient
from trainer.config import Config
from trainer.runtime.ranks import Ranks
from trainer.train.task import Loss, as_sums


class Adversary:
    """A discriminator, and the weight of the adversarial term in the first stage's loss.

    The weight is a ratio of gradients at the decoder's last layer (Esser et al. 2021, "Taming
    Transformers", equation 7), over all micro batches and ranks of a step. These gradients are
    complete at the end of the first stage's turn. A step therefore uses the weight from the step
    before; the first step uses 0.
    """

    def __init__(self, config: Config, ranks: Ranks, last_layer: nn.Module) -> None:
        assert isinstance(last_layer, nn.Conv2d)
        options = config.autoencoder.loss
        self.module = PatchDiscriminator(options.discriminator).to(ranks.device)
        self.ranks = ranks
        self.layer = last_layer
        self.layer_inputs = torch.empty(0)
        """Input of the last layer in the latest forward pass: [b, C, H, W]."""
        self.weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.factor = options.gan_weight
        self._start_step = options.gan_start_step
        last_layer.register_forward_pre_hook(self._keep_inputs)

    def is_active(self, step: int) -> bool:
        """Return whether optimizer step `step` (from 0) has an adversarial term."""
        return step + 1 >= self._start_step

    def update(self, error: Tensor, adversarial: Tensor) -> None:
        """Set the weight for the next step from mean gradients [O, I, k, k] at the last layer."""
        weight = adaptive_weight(error, adversarial)
        # the engine skips steps with gradients that are not finite, so their weight is not used
        self.weight = torch.where(weight.isfinite(), weight, self.weight)

    def _keep_inputs(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layer_inputs = inputs[0].detach()


class AdversarialStep:
    """The adversarial terms of one training step, with their gradients and images."""

    def __init__(self, adversary: Adversary) -> None:
        self._adversary = adversary
        self._pairs: deque[tuple[Tensor, Tensor]] = deque()
        shape, device = (2, *adversary.layer.weight.shape), adversary.weight.device
        self._sums = {
            "gradients": torch.zeros(shape, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.float64, device=device),
        }

    def terms(
        self,
        images: Tensor,
        reconstructions: Tensor,
        error: Callable[[Tensor], Tensor],
        log_variance: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return a micro batch's error and weighted adversarial term, and numbers to log.

        images, reconstructions: [b, 3, H, W] in [-1, 1]; error: maps reconstructions to a scalar;
        log_variance: scalar. Both terms are scalars that can be differentiated by
        `reconstructions`. Their gradients are computed outside the graph of the network, because
        DeepSpeed's hooks there would count them as a backward pass.
        """
        adversary = self._adversary
        leaf = reconstructions.detach().float().requires_grad_()
        dtype = next(adversary.module.parameters()).dtype
        parts = [error(leaf), adversarial_loss(adversary.module.classify(leaf.to(dtype)))]
        gradients = [torch.autograd.grad(part, leaf)[0] for part in parts]
        at_layer = [
            convolution_weight_gradient(adversary.layer_inputs, adversary.layer, gradient)
            for gradient in gradients
        ]
        at_layer[0] = at_layer[0] * torch.exp(-log_variance.detach().float())
        self._sums["gradients"] += torch.stack(at_layer)
        self._sums["count"] += 1
        self._pairs.append((images, reconstructions.detach()))
        weight = adversary.factor * adversary.weight.float()
        of_error, of_adversary = (
            with_gradient(part, reconstructions, gradient)
            for part, gradient in zip(parts, gradients, strict=True)
        )
        numbers = {"loss_adversarial": parts[1], "adversarial_weight": weight}
        return of_error, weight * of_adversary, numbers

    def close(self) -> None:
        """Set the weight for the next step from the gradients of all ranks; collective."""
        self._adversary.ranks.sum_(self._sums)
        error, adversarial = self._sums["gradients"] / self._sums["count"]
        self._adversary.update(error, adversarial)

    def discriminator_loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute the hinge loss (Lim and Ye 2017, "Geometric GAN") of the discriminator `model`.

        Each call takes the images of the next micro batch of `terms`, detached, instead of `batch`.
        Raises: IndexError after the last one.
        """
        logits = model(*self._pairs.popleft())
        loss = hinge_loss(logits)
        numbers = {
            "loss_discriminator": loss,
            "logits_real": logits.real.float().mean(),
            "logits_fake": logits.fake.float().mean(),
        }
        return Loss(loss, as_sums(numbers))
