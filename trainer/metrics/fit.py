"""How well samples fit the images or label maps that their conditions were made of.

Beside the numbers of the samples stand those of a simple method, and of a control with shuffled
conditions, which must be worse.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.conditioning.conditioner import Inputs
from models.conditioning.degradations import bicubic
from models.conditioning.given import Given
from models.config import ConditionerKind
from models.config.conditioning import MAP_CLASSES
from models.first_stage.perceptual import build_perceptual, perceptual_name
from trainer.config import Config
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.reconstruction import ReconstructionMetrics

Value = TypeVar("Value")
Images = Tensor
"""[B, 3, H, W] float32 in [-1, 1]."""
AGREE = 0.2
"""Largest distance of two mean colours that agree: the root of the mean square over the channels,
of pixels in [-1, 1]; 25 of 255."""
SMALLEST_REGION = 16
"""[pixels] Smaller regions of a class are not compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of samples with what they are compared with."""

    given: Given
    images: Images
    """The samples, on the device."""
    features: Sequence[Tensor]
    """Features of the samples, [B, D] for each extractor."""
    inputs: Inputs
    """What the conditioner prepared of the conditions, on the CPU."""
    reconstruct: Callable[[Images], Images]
    """Encodes images with the first stage, and decodes them."""

    @property
    def truth(self) -> Images:
        """The images that the conditions were made of, on the device."""
        assert self.given.images is not None
        return self.given.images.to(self.images.device)


class Fit(ABC):
    """Metrics of one kind of condition, over the samples of one rank."""

    networks: Sequence[nn.Module] = ()
    """Networks that `update` needs on the device."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add samples."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the float64 sums themselves: a sum over ranks in place merges ranks."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the metrics by name, after the ranks are merged."""


class Copies(Fit):
    """Metrics of samples that should equal an image: PSNR, SSIM, a perceptual distance, rFID."""

    methods: Sequence[str]
    """Names of the methods of `others`."""

    def __init__(
        self,
        config: Config,
        extractors: Sequence[FeatureExtractor],
        device: torch.device,
        *,
        baselines: bool,
    ) -> None:
        """extractors: of eval.features. baselines: whether to measure the other methods, too."""
        features = config.eval.perceptual_features
        distance = build_perceptual(features, config.eval.perceptual_weights)
        named = perceptual_name(features), distance
        self.networks = [distance]
        self._samples = ReconstructionMetrics(extractors, named, device)
        self._shuffled = ReconstructionMetrics((), named, device)
        self._others = {
            method: ReconstructionMetrics(extractors, named, device)
            for method in (self.methods if baselines else ())
        }

    @abstractmethod
    def others(self, batch: Batch) -> Sequence[Images]:
        """Return what other methods make of the conditions, for each of `methods`."""

    @abstractmethod
    def shuffled(self, batch: Batch) -> Images:
        """Return what samples would be for shuffled conditions."""

    @override
    def update(self, batch: Batch) -> None:
        truth, device = batch.truth, batch.images.device
        features = self._samples.extract(truth)
        self._samples.update(truth, batch.images, (features, batch.features))
        if len(truth) > 1:  # one condition cannot be shuffled
            self._shuffled.update(truth, self.shuffled(batch))
        if self._others:
            for metrics, made in zip(self._others.values(), self.others(batch), strict=True):
                images = made.to(device)
                metrics.update(truth, images, (features, metrics.extract(images)))

    def _all(self) -> dict[str, ReconstructionMetrics]:
        """Return the metrics by the beginning of their names."""
        others = {f"{method}/": metrics for method, metrics in self._others.items()}
        return {"": self._samples, "shuffled/": self._shuffled, **others}

    @override
    def state(self) -> dict[str, Tensor]:
        return _named({begin: one.state() for begin, one in self._all().items()})

    @override
    def compute(self) -> dict[str, float]:
        parts = {begin: one for begin, one in self._all().items() if one.count}
        return _named({begin: one.compute() for begin, one in parts.items()})


def _named(parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    return {begin + name: value for begin, part in parts.items() for name, value in part.items()}


class SuperResolutionFit(Copies):
    """Samples against the images; no sample can be better than the first stage alone."""

    methods = "bicubic", "first_stage"

    @override
    def others(self, batch: Batch) -> Sequence[Images]:
        height, width = batch.truth.shape[-2:]
        larger = bicubic(batch.inputs["small"], (height, width))
        return larger, batch.reconstruct(batch.truth)

    @override
    def shuffled(self, batch: Batch) -> Images:
        return batch.images.roll(1, 0)


class InpaintingFit(Copies):
    """Samples against the images; known pixels are equal, so that the hole alone counts."""

    methods = ("mean_colour",)

    @override
    def others(self, batch: Batch) -> Sequence[Images]:
        truth, holes = batch.truth, self._holes(batch)
        known = 1 - holes
        sums = (truth * known).sum((2, 3), keepdim=True)
        return (truth * known + holes * sums / known.sum((2, 3), keepdim=True).clamp(min=1),)

    @override
    def shuffled(self, batch: Batch) -> Images:
        """Fill the holes with the pixels of other images."""
        truth, holes = batch.truth, self._holes(batch)
        return truth * (1 - holes) + truth.roll(1, 0) * holes

    def _holes(self, batch: Batch) -> Tensor:
        return batch.inputs["holes"].to(batch.images.device)


class MapFit(Fit):
    """Share of the pixels whose class has, in the sample, the mean colour that it has in the image.

    The control compares samples and images within the regions of another map.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, 2, dtype=torch.float64, device=device)

    @override
    def update(self, batch: Batch) -> None:
        truth, maps = batch.truth, batch.given.maps
        assert maps is not None
        maps = maps.to(truth.device)
        self._sums[0] += _agreement(truth, batch.images, maps)
        if len(truth) > 1:  # one condition cannot be shuffled
            self._sums[1] += _agreement(truth.roll(1, 0), batch.images, maps.roll(1, 0))

    @override
    def state(self) -> dict[str, Tensor]:
        return {"agreement": self._sums}

    @override
    def compute(self) -> dict[str, float]:
        names = ("colour_agreement", "shuffled/colour_agreement")
        pairs = zip(names, self._sums, strict=True)
        return {name: float(agree / whole) for name, (agree, whole) in pairs if whole}


def _agreement(truth: Images, images: Images, maps: Tensor) -> Tensor:
    """Count the pixels of regions that agree, and of all regions: [2] float64."""
    first = torch.arange(len(maps), device=maps.device)[:, None, None] * MAP_CLASSES
    regions = (maps.long() + first).flatten()
    sizes = torch.bincount(regions, minlength=len(maps) * MAP_CLASSES).double()

    def means(pixels: Images) -> Tensor:
        sums = torch.zeros(3, len(sizes), dtype=torch.float64, device=pixels.device)
        sums.index_add_(1, regions, pixels.double().transpose(0, 1).flatten(1))
        return sums / sizes.clamp(min=1)

    distances = (means(truth) - means(images)).square().mean(0).sqrt()
    sizes = sizes * (sizes >= SMALLEST_REGION)
    return torch.stack([(sizes * (distances <= AGREE)).sum(), sizes.sum()])


def build_fit(
    config: Config,
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
    *,
    baselines: bool,
) -> Fit | None:
    """Build the metrics of the config's kind of condition; None: it has none.

    extractors: of eval.features. baselines: whether to measure simple methods, too.
    Raises: ValueError or FileNotFoundError that names the option of weights that are missing.
    """
    match config.conditioner.kind:
        case ConditionerKind.super_resolution:
            return SuperResolutionFit(config, extractors, device, baselines=baselines)
        case ConditionerKind.inpainting:
            return InpaintingFit(config, extractors, device, baselines=baselines)
        case ConditionerKind.semantic_map:
            return MapFit(device)
        case _:
            return None
