"""The protocol of an evaluation: all settings that its numbers depend on, without the weights."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.config.choices import Metric
from trainer.metrics.features import FeatureExtractor
from trainer.runs.paths import PROTOCOLS
from trainer.runs.record import public_config
from trainer.runtime import rng
from trainer.runtime.devices import inference_dtype

DRAWING = ("sampler", "diffusion", "autoencoder", "conditioner")
"""Sections of the config that samples depend on."""
LATER: dict[str, Mapping[str, object]] = {
    "diffusion": {"latent_scale": "auto", "scaling_factor": 1.0, "loss": "l2"},
    "conditioner": {"layers": 16, "classes": [], "planes": 3, "degradation": "bicubic"},
}
"""Options that the first protocols did not have, and what they would have been: with these values
a protocol keeps its hash."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Settings of an evaluation, as JSON values."""

    content: Mapping[str, object]

    @property
    def hash(self) -> str:
        """Name of the protocol, logged with every number: 12 hex digits of its SHA-256."""
        text = json.dumps(self.content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def file(self, run: Path) -> dict[Path, bytes]:
        """Return path and content of protocols/HASH.json of a run folder; empty if it exists."""
        path = run / PROTOCOLS / f"{self.hash}.json"
        text = json.dumps(dict(self.content), indent=1) + "\n"
        return {} if path.exists() else {path: text.encode()}


def samples_protocol(
    config: Config,
    extractors: Iterable[FeatureExtractor],
    reference: Mapping[str, object],
    device: torch.device,
    conditions: str,
) -> Protocol:
    """Make the protocol of a checkpoint's samples, drawn on this device.

    reference: see `References.about`. conditions: hash of the data set whose images, label maps or
    boxes the conditions are made of; empty: captions alone.
    """
    whole, own = public_config(config), config.eval
    samples = {
        "num_samples": own.num_samples,
        "seed": own.seed,
        "noise": rng.NORMAL_STREAM,
        "prompts": rng.CHOICE_STREAM,
        **{name: _section(whole, name) for name in DRAWING},
        **_arithmetic(config, device),
    }
    if conditions:
        samples |= {"conditions": conditions, "perceptual": str(own.perceptual_features)}
    return Protocol(_content(config, samples, own.clip_score, extractors, reference))


def _section(config: Mapping[str, Any], name: str) -> dict[str, object]:
    first = LATER.get(name, {})
    return {
        option: value
        for option, value in config[name].items()
        if option not in first or value != first[option]
    }


def _arithmetic(config: Config, device: torch.device) -> dict[str, object]:
    """Return what differs from fp32 while samples are drawn."""
    found: dict[str, object] = {}
    dtype = inference_dtype(device, config.train.precision)
    if dtype is not torch.float32:
        found["precision"] = str(dtype).removeprefix("torch.")
    if config.eval.tf32 and device.type == "cuda":
        found["products"] = "tf32"
    return found


def folder_protocol(
    config: Config, extractors: Iterable[FeatureExtractor], reference: Mapping[str, object]
) -> Protocol:
    """Make the protocol of image files, without prompts; reference: see `References.about`."""
    return Protocol(_content(config, "the images of a folder", False, extractors, reference))


def _content(
    config: Config,
    samples: object,
    clip_score: bool,
    extractors: Iterable[FeatureExtractor],
    reference: Mapping[str, object],
) -> dict[str, object]:
    own = config.eval
    content: dict[str, object] = {
        "samples": samples,
        "image_size": config.data.image_size,
        "features": {
            str(extractor.name): {"fingerprint": extractor.fingerprint, "resize": extractor.resize}
            for extractor in extractors
        },
        "metrics": [str(metric) for metric in own.metrics],
        "clip_score": clip_score,
        "reference": dict(reference),
    }
    if Metric.kid in own.metrics:
        content["kid_subset_size"] = own.kid_subset_size
    return content
