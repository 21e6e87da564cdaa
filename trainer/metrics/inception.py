"""InceptionV3: the network of FID, KID and the inception score."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from models.conditioning.clip import Clip
from trainer.config import EvalConfig, InceptionResize
from trainer.config.choices import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic, read_tensors

INPUT_SIZE = 299
TENSORFLOW = "TensorFlow 1's bilinear to {size} px"


def build(config: EvalConfig, load_clip: Callable[[], Clip]) -> "InceptionV3":
    """Build the extractor of eval.inception_weights and eval.inception_resize.

    Raises: FileNotFoundError or ValueError that names eval.inception_weights.
    """
    return InceptionV3(config.inception_weights, config.inception_resize)


class InceptionV3(FeatureExtractor):
    """torch-fidelity's InceptionV3 with TensorFlow's weights of 2015, the network of FID.

    2048 features: the last pooling layer, averaged over the 8x8 grid (Heusel et al. 2017).
    """

    def __init__(
        self, weights: str = "", resize: InceptionResize = InceptionResize.tensorflow
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package unpickles the file of weights: give it a copy that has tensors only.
        tensors_only = io.BytesIO()
        torch.save(_inception_state(weights), tensors_only)
        tensors_only.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors_only
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"eval.inception_weights: {weights or 'the download'} does not hold the weights "
                "of torch-fidelity's InceptionV3"
            ) from error
        is_clean = resize is InceptionResize.clean
        words = (BICUBIC if is_clean else TENSORFLOW).format(size=INPUT_SIZE)
        super().__init__(Features.inception, 2048, network, resize=words)
        self._is_clean = is_clean
        self._classes = network.fc.weight
        # The package's forward pass is a slow resize, then these layers one after another.
        *layers, _ = network.children()
        self._layers = nn.Sequential(*layers)

    @override
    def pooled(self, images: Tensor) -> Tensor:
        if self._is_clean:
            pixels = bicubic(images, INPUT_SIZE)
        else:
            pixels = tensorflow_bilinear(images.float(), INPUT_SIZE)
        pixels = pixels.contiguous(memory_format=torch.channels_last).sub_(128).div_(128)
        return self._layers(pixels).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """Compute class logits without the bias, for the inception score: [N, 2048] → [N, 1008]."""
        return features.to(self._classes) @ self._classes.T


def tensorflow_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Resize like TensorFlow 1, bilinear: [B, 3, H, W] float32 → [B, 3, size, size].

    Output pixel i samples the input at i · in / out, without half-pixel centres or antialiasing.
    This equals torch's resize with aligned corners, from H + 1 to size + 1 pixels, if the last row
    and column are repeated before it and removed after it.
    """
    if pixels.shape[-2:] == (size, size):
        return pixels
    padded = F.pad(pixels, (0, 1, 0, 1), "replicate")
    resized = F.interpolate(padded, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return resized[..., :size, :size]


def _inception_state(weights: str) -> dict[str, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if not weights:
        try:
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                "eval.inception_weights: torch-fidelity's InceptionV3 weights could not be "
                f"downloaded ({error}); on a machine with network fetch {URL_INCEPTION_V3}, and "
                "set eval.inception_weights to that file"
            ) from error
    return read_tensors(Path(weights), "eval.inception_weights")
