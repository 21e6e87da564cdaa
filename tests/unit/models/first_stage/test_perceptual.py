import urllib.error
import warnings
from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from models.config import PerceptualFeatures
from models.first_stage.efficientnet import EfficientNetLite0Levels, load_efficientnet_lite0
from models.first_stage.perceptual import build_perceptual

OPTION = r"autoencoder\.loss\.perceptual_weights"


def pictures(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.rand(2, 3, *shape) * 2 - 1
    return images, (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """Torchvision's random VGG16, in its own names; the classifier would be half a gigabyte."""
    torch.manual_seed(1)
    with torch.device("meta"):
        network = vgg16(weights=None)
    features = network.get_submodule("features").to_empty(device="cpu")
    for layer in features.children():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.uniform_(layer.bias, -0.1, 0.1) if layer.bias is not None else None
    return {f"features.{name}": value for name, value in features.state_dict().items()}


def test_distance_and_gradient_are_those_of_the_package_lpips(
    vgg: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(vgg, tmp_path / "vgg.pth")
    ours = build_perceptual(PerceptualFeatures.vgg16, str(tmp_path / "vgg.pth"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, whose old argument the package takes
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices = [layer for number in range(1, 6) for layer in getattr(theirs.net, f"slice{number}")]
    nn.Sequential(*slices).load_state_dict(
        {name.removeprefix("features."): value for name, value in vgg.items()}
    )
    images, others = pictures(40, 48)
    results = []
    for distance in (ours, theirs):
        leaf = others.clone().requires_grad_()
        value = distance(images, leaf).flatten()
        results.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    (value, gradient), (expected, expected_gradient) = results
    assert expected.min() > 0.01
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5 * scale)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_weights_that_cannot_be_had_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=OPTION):
        build_perceptual(PerceptualFeatures.vgg16, str(tmp_path / "none.pth"))
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"{OPTION}: .*other\.pth does not hold"):
        build_perceptual(PerceptualFeatures.vgg16, str(tmp_path / "other.pth"))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{OPTION}: .*cut\.pth does not hold"):
        build_perceptual(PerceptualFeatures.vgg16, str(tmp_path / "cut.pth"))

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=rf"{OPTION}.*no network.*efficientnet_lite0"):
        build_perceptual(PerceptualFeatures.vgg16, "")


def test_efficientnets_levels_are_the_networks_own() -> None:
    levels = EfficientNetLite0Levels("x").eval()
    network = load_efficientnet_lite0("x").eval()
    images, others = pictures(64, 64)
    with torch.no_grad():
        found = levels(images)
        last = network.get_submodule("_bn1")(network.get_submodule("_conv_head")(found[-1]))
        torch.testing.assert_close(torch.clamp(last, 0, 6), network.extract_features(images))
    assert [level.shape[1:] for level in found] == [
        (16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)
    ]  # fmt: skip
    distance = build_perceptual(PerceptualFeatures.efficientnet_lite0, "")
    near = distance(images, images + 0.1 * (others - images))
    assert torch.equal(distance(images, images), torch.zeros(2))
    assert (near > 0).all()
    assert (near < distance(images, others)).all()
    assert distance.training is False
