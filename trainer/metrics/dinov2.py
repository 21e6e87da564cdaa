"""DINOv2: features of a network that was trained without labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from models.conditioning.clip import Clip
from trainer.config import Dinov2Size, EvalConfig
from trainer.config.choices import Features
from trainer.metrics.features import BICUBIC, FeatureExtractor, bicubic, read_tensors

SIDE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1
"""Added by the authors' code to the side of the patch grid when it resizes position embeddings."""


def build(config: EvalConfig, load_clip: Callable[[], Clip]) -> "Dinov2":
    """Build the extractor of eval.dinov2_size and eval.dinov2_weights.

    Raises: FileNotFoundError or ValueError that names eval.dinov2_weights.
    """
    return Dinov2(config.dinov2_size, config.dinov2_weights)


class Dinov2(FeatureExtractor):
    """The class token of DINOv2 (Oquab et al. 2023) at 224 px, which Stein et al. 2023 propose.

    384, 768, 1024 or 1536 features for the sizes small, base, large and giant.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: Dinov2Size = Dinov2Size.large, weights: str = "") -> None:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        with torch.device("meta"):
            network: Any = timm.create_model(
                f"vit_{size}_patch14_dinov2", pretrained=False, num_classes=0, img_size=SIDE
            )
        state = _state(network.pretrained_cfg["url"], weights)
        try:
            state["pos_embed"] = resized_positions(state["pos_embed"])
            network.load_state_dict(checkpoint_filter_fn(state, network), assign=True)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"eval.dinov2_weights: {weights or 'the download'} does not hold the weights of "
                f"DINOv2 of eval.dinov2_size={size}"
            ) from error
        resize = BICUBIC.format(size=SIDE)
        super().__init__(Features.dinov2, network.num_features, network.float(), resize=resize)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255)

    @override
    def pooled(self, images: Tensor) -> Tensor:
        return self.network((bicubic(images, SIDE) - self.mean) / self.std)


def _state(url: str, weights: str) -> dict[str, Tensor]:
    if weights:
        return read_tensors(Path(weights), "eval.dinov2_weights")
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"eval.dinov2_weights: DINOv2's weights could not be downloaded ({error}); on a "
            f"machine with network fetch {url}, and set eval.dinov2_weights to that file"
        ) from error


def resized_positions(positions: Tensor) -> Tensor:
    """Resize position embeddings of n x n patches, [1, 1 + n², D], to 16 x 16: [1, 257, D].

    Bicubic, with the scale of the authors' code: (16 + OFFSET) / n instead of 16 / n.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    wanted = SIDE // PATCH
    if side == wanted:
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    scale = (wanted + OFFSET) / side
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), resized.flatten(2).mT], 1)
