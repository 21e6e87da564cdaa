"""Inception: the network of FID, KID and the inception score."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Features, InceptionResize
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic, read_tensors

INPUT_SIZE = 299
TENSORFLOW = "TensorFlow 1's bilinear to {size} px"


class InceptionV3(FeatureExtractor):
    """torch-fidelity's InceptionV3 with TensorFlow's weights of 2015: the network of FID.

    2048 features, averaged over the 8x8 grid (Heusel et al. 2017).
    """

    def __init__(
        self, weights: str = "", resize: InceptionResize = InceptionResize.tensorflow
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package unpickles whatever its path holds: it is given a copy that holds tensors only.
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
        # The package's forward is its layers in a row, after a resize that copies images ten times.
        *layers, _ = network.children()
        self._layers = nn.Sequential(*layers)

    def pooled(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8; returns [B, 2048] float32."""
        if self._is_clean:
            pixels = bicubic(images, INPUT_SIZE)
        else:
            pixels = tensorflow_bilinear(images.float(), INPUT_SIZE)
        pixels = pixels.contiguous(memory_format=torch.channels_last).sub_(128).div_(128)
        return self._layers(pixels).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, 2048] → class logits [N, 1008] without the bias, as the score takes them."""
        return features.to(self._classes) @ self._classes.T


def tensorflow_bilinear(pixels: Tensor, size: int) -> Tensor:
    """TensorFlow 1's resize: output i samples at i · in / out, without half pixels or antialiasing.

    [B, 3, H, W] float32 → [B, 3, size, size]. With the last row and column repeated once, that
    is torch's resize by aligned corners from H + 1 to size + 1 pixels, without its last ones.
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
