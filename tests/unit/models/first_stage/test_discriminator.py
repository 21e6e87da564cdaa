import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.config import DiscriminatorConfig, DiscriminatorNorm
from models.first_stage.discriminator import (
    PatchDiscriminator,
    PatchLogits,
    adversarial_loss,
    hinge_loss,
)


def test_its_size_is_the_published_one() -> None:
    """pix2pix's 70x70 discriminator, of an image and its condition, has 2,768,705 parameters."""
    network = PatchDiscriminator(DiscriminatorConfig(), in_channels=6)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_768_705
    assert network.classify(torch.zeros(1, 6, 256, 256)).shape == (1, 1, 30, 30)


def test_a_logit_sees_seventy_pixels() -> None:
    config = DiscriminatorConfig(channels=2, norm=DiscriminatorNorm.batch)
    network = PatchDiscriminator(config).eval()  # its norms do not mix places then
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    images = torch.zeros(1, 3, 160, 160, requires_grad=True)
    logits = network.classify(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], images)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_a_group_norm_judges_each_image_by_itself_and_a_batch_norm_does_not() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for norm, alone in ((DiscriminatorNorm.group, True), (DiscriminatorNorm.batch, False)):
        network = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=2, norm=norm))
        together, apart = network.classify(images)[:2], network.classify(images[:2])
        assert torch.allclose(together, apart, atol=1e-6) is alone
        buffers = [name for name, _ in network.named_buffers()]
        assert bool(buffers) is not alone


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-4, 4), min_size=1, max_size=6),
    st.lists(st.floats(-4, 4), min_size=1, max_size=6),
)
def test_hinge_losses_are_the_papers(real: list[float], fake: list[float]) -> None:
    logits = PatchLogits(torch.tensor(real), torch.tensor(fake))
    expected = sum(max(0.0, 1 - x) for x in real) / len(real)
    expected += sum(max(0.0, 1 + x) for x in fake) / len(fake)
    assert hinge_loss(logits).item() == pytest.approx(expected / 2, abs=1e-5)
    assert adversarial_loss(logits.fake).item() == pytest.approx(-sum(fake) / len(fake), abs=1e-5)
