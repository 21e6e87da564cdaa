"""The first stage's adversary: a discriminator, its turn in a step, and its weight in the loss."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.discriminator import PatchDiscriminator, adversarial_loss, hinge_loss
from models.first_stage_loss import adaptive_weight, convolution_weight_gradient, with_gradient
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.tasks import Loss, averaged


class Adversary:
    """Judges the reconstructions of a step, then learns from the same ones, detached.

    Its weight balances the gradients of the whole batch at the decoder's last layer, over micro
    batches and ranks. They are known when the first stage's turn is over, so that a step takes the
    weight of the one before: 0 at the first.
    """

    def __init__(self, config: Config, ranks: Ranks, last_layer: nn.Module) -> None:
        assert isinstance(last_layer, nn.Conv2d)
        options = config.autoencoder.loss
        self.module = PatchDiscriminator(options.discriminator).to(ranks.device)
        self._ranks = ranks
        self._start_step = options.gan_start_step
        self._share = options.gan_weight
        self._weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._layer = last_layer
        last_layer.register_forward_pre_hook(self._keep_inputs)
        self.begin_turn()

    def plays(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) has an adversarial term."""
        return step + 1 >= self._start_step

    def state(self) -> float:
        """The weight, for a checkpoint."""
        return self._weight.item()

    def load(self, weight: float) -> None:
        """Go on with the weight of a checkpoint."""
        self._weight.fill_(weight)

    def judge(
        self,
        images: Tensor,
        reconstructions: Tensor,
        error: Callable[[Tensor], Tensor],
        log_variance: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The error and the weighted adversarial term of a micro batch, and numbers to log.

        Both are scalars to differentiate by `reconstructions`. Their gradients are taken apart from
        the network's own graph, in which DeepSpeed's hooks would take them for a backward pass.
        """
        leaf = reconstructions.detach().float().requires_grad_()
        dtype = next(self.module.parameters()).dtype
        parts = [error(leaf), adversarial_loss(self.module.judge(leaf.to(dtype)))]
        gradients = [torch.autograd.grad(part, leaf)[0] for part in parts]
        at_layer = [
            convolution_weight_gradient(self._inputs, self._layer, gradient)
            for gradient in gradients
        ]
        at_layer[0] = at_layer[0] * torch.exp(-log_variance.detach().float())
        self._sums["gradients"] += torch.stack(at_layer)
        self._sums["count"] += 1
        self._pairs.append((images, reconstructions.detach()))
        weight = self._share * self._weight.float()
        of_error, of_adversary = (
            with_gradient(part, reconstructions, gradient)
            for part, gradient in zip(parts, gradients, strict=True)
        )
        numbers = {"loss_adversarial": parts[1], "adversarial_weight": weight}
        return of_error, weight * of_adversary, numbers

    def begin_turn(self) -> None:
        """Before the first stage's first micro batch of a step: forget a turn that was given up."""
        shape, device = (2, *self._layer.weight.shape), self._ranks.device
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._sums = {
            "gradients": torch.zeros(shape, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.float64, device=device),
        }

    def end_turn(self) -> None:
        """After the first stage's last micro batch of a step: find the next step's weight."""
        self._ranks.sum_(self._sums)
        error, adversarial = self._sums["gradients"] / self._sums["count"]
        weight = adaptive_weight(error, adversarial)
        # a step that is skipped for its infinities leaves the weight as it was
        self._weight = torch.where(weight.isfinite(), weight, self._weight)

    def losses(self, model: nn.Module) -> Iterator[Loss]:
        """The discriminator's loss for each micro batch that was judged in this step."""
        for images, reconstructions in self._pairs:
            verdict = model(images, reconstructions)
            loss = hinge_loss(verdict)
            numbers = {
                "loss_discriminator": loss,
                "logits_real": verdict.real.float().mean(),
                "logits_fake": verdict.fake.float().mean(),
            }
            yield Loss(loss, averaged(numbers))
        self.begin_turn()

    def _keep_inputs(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs[0].detach()
