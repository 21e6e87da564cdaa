"""The result of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of a checkpoint, and a picture of samples."""

    metrics: Mapping[str, float | str]
    """Name in logs, without `eval/` → number; `protocol` → hash of the protocol."""
    picture: Tensor
    """Grid of samples [3, H, W] uint8."""
    about: Mapping[str, object] = field(default_factory=dict[str, object])
    """What the picture's PNG says of itself: see trainer.pictures.png.about_grid."""
    files: Mapping[Path, bytes] = field(default_factory=dict[Path, bytes])
    """Contents of further files of the run folder, by path, to be written by the caller."""
