"""The adversary's part in a first stage's loss, against plain autograd through all of it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models.first_stage.autoencoder import Reconstruction, build_autoencoder
from models.first_stage.discriminator import PatchDiscriminator, adversarial_loss, hinge_loss
from models.first_stage.loss import (
    LikelihoodFirstStage,
    adaptive_weight,
    negative_log_likelihood,
)
from tests.support.workshop import NETWORKS
from trainer.cli import load_config
from trainer.config import Config
from trainer.runtime.ranks import Ranks
from trainer.train.adversary import AdversarialStep, Adversary
from trainer.train.first_stage import FirstStageLoss
from trainer.train.task import shapes_only

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def config() -> Config:
    return load_config(
        [
            "+experiment=emoji_autoencoder",
            *NETWORKS,
            "autoencoder.loss.gan_weight=0.7",
            "autoencoder.loss.gan_start_step=3",
            "autoencoder.loss.discriminator.channels=4",
            "autoencoder.loss.discriminator.layers=2",
        ]
    )


def networks(config: Config) -> tuple[LikelihoodFirstStage, Adversary]:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder)
    first_stage = LikelihoodFirstStage(autoencoder, learn_log_variance=True)
    assert first_stage.log_variance is not None
    nn.init.constant_(first_stage.log_variance, -0.8)
    return first_stage, Adversary(config, ALONE, autoencoder.decoder.conv_out)


def images(number: int) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1


def error_of(images: Tensor, pixels: Tensor) -> Tensor:
    return (pixels - images).abs().mean() + (pixels - images).square().mean()


def loss_of(first_stage: nn.Module, adversarial_step: AdversarialStep, batch: Tensor) -> Tensor:
    reconstruction: Reconstruction
    reconstruction, log_variance = first_stage(batch, None)
    error, term, _ = adversarial_step.terms(
        batch, reconstruction.images, lambda pixels: error_of(batch, pixels), log_variance
    )
    return negative_log_likelihood(error, log_variance) + term


def by_hand(
    first_stage: nn.Module, discriminator: PatchDiscriminator, batch: Tensor
) -> tuple[Tensor, Tensor]:
    """Likelihood and adversarial loss, all of one graph."""
    reconstruction, log_variance = first_stage(batch, None)
    likelihood = negative_log_likelihood(error_of(batch, reconstruction.images), log_variance)
    return likelihood, adversarial_loss(discriminator.classify(reconstruction.images))


def test_weight_and_gradients_are_those_of_autograd_by_hand(config: Config) -> None:
    first_stage, adversary = networks(config)
    plain, discriminator = copy.deepcopy(first_stage), copy.deepcopy(adversary.module)
    last = plain.autoencoder.decoder.conv_out.weight
    batches = [images(1), images(2)]
    adversarial_step = AdversarialStep(adversary)
    for batch in batches:
        loss_of(first_stage, adversarial_step, batch)
    assert adversary.weight == 0  # no step came before
    adversarial_step.close()
    of_error, of_adversary = [], []
    for batch in batches:
        likelihood, adversarial = by_hand(plain, discriminator, batch)
        of_error.append(torch.autograd.grad(likelihood, last, retain_graph=True)[0])
        of_adversary.append(torch.autograd.grad(adversarial, last)[0])
    expected = adaptive_weight(torch.stack(of_error).mean(0), torch.stack(of_adversary).mean(0))
    assert expected.item() > 0.1
    assert adversary.weight.item() == pytest.approx(expected.item(), rel=1e-4)

    likelihood, adversarial = by_hand(plain, discriminator, batches[0])
    (likelihood + 0.7 * adversary.weight.item() * adversarial).backward()
    loss_of(first_stage, AdversarialStep(adversary), batches[0]).backward()
    assert all(parameter.grad is None for parameter in adversary.module.parameters())
    for (name, ours), theirs in zip(
        first_stage.named_parameters(), plain.parameters(), strict=True
    ):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_do_not_change_the_weight_nor_does_an_infinite_one(config: Config) -> None:
    first_stage, whole = networks(config)
    step = AdversarialStep(whole)
    loss_of(first_stage, step, torch.cat([images(1), images(2)]))
    step.close()
    first_stage, cut = networks(config)
    step = AdversarialStep(cut)
    for number in (1, 2):
        loss_of(first_stage, step, images(number))
    step.close()
    assert cut.weight.item() == pytest.approx(whole.weight.item(), rel=1e-4)
    kept = cut.weight.item()
    step = AdversarialStep(cut)
    loss_of(first_stage, step, images(1) * float("inf"))
    step.close()
    assert cut.weight.item() == kept


def test_the_discriminator_learns_from_the_reconstructions_it_judged(config: Config) -> None:
    first_stage, adversary = networks(config)
    assert [adversary.is_active(step) for step in range(4)] == [False, False, True, True]
    adversarial_step = AdversarialStep(adversary)
    batch = shapes_only(images=images(0))
    for number in (1, 2):
        loss_of(first_stage, adversarial_step, images(number))
    for number in (1, 2):
        loss = adversarial_step.discriminator_loss(adversary.module, batch).mean
        reconstruction, _ = first_stage(images(number), None)
        expected = hinge_loss(adversary.module(images(number), reconstruction.images))
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, list(first_stage.parameters()), allow_unused=True)
        assert all(grad is None for grad in grads)
    with pytest.raises(IndexError):  # each is learned from once
        adversarial_step.discriminator_loss(adversary.module, batch)


def test_the_turns_of_a_step_alone_decide_the_next_weight(config: Config) -> None:
    """Closing the first turn is a call of its own; a rehearsal without it changes nothing."""
    first_stage, adversary = networks(config)
    loss = FirstStageLoss(config, ALONE.device)
    batch = shapes_only(images=images(1))
    batch.drawn = loss.draw(batch)
    loss(first_stage, batch, AdversarialStep(adversary))
    assert adversary.weight == 0
    adversarial_step = AdversarialStep(adversary)
    loss(first_stage, batch, adversarial_step)
    adversarial_step.close()
    assert adversary.weight > 0
