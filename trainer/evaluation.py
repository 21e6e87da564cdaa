"""How good are the samples: Fréchet distances and CLIP score under one stated protocol.

Samples take the captions of training images, drawn once by seed; the reference is the whole
training set. Ranks draw disjoint samples and reduce sums, so their number changes nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.image_stream import ImageStream
from data.manifest import FILE_NAME
from data.storage import join, size_bytes
from models.clip import load_clip
from trainer import distributed, rng
from trainer.checkpoint import chosen_checkpoint
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.images import grid, save_png, to_uint8
from trainer.metrics.clip_score import ClipScore
from trainer.metrics.features import FeatureExtractor, build_feature_extractor
from trainer.metrics.frechet import (
    GaussianMoments,
    frechet_distance,
    load_moments,
    save_moments,
)
from trainer.pipeline import Pipeline
from trainer.rng import Purpose
from trainer.runs import describe
from trainer.streams import open_images
from trainer.tasks import Evaluation

GRID_COLUMNS = 4


def evaluate(config: Config) -> None:
    """Measure checkpoint.load, or the run's newest checkpoint, and keep the numbers in run.dir.

    Raises: FileNotFoundError or ValueError naming what is missing.
    """
    ranks = distributed.join()
    checkpoint = chosen_checkpoint(config)
    evaluator = Evaluator(config, ranks)
    result = evaluator.evaluate(Pipeline.load(config, checkpoint, ranks.device))
    if not ranks.is_main:
        return
    protocol = evaluator.protocol()
    stem = Path(config.run.dir) / "evaluations" / f"step_{checkpoint.step:08d}_{protocol}"
    save_png(stem.with_suffix(".png"), result.picture)
    values = {"step": checkpoint.step, "protocol": protocol, **result.metrics}
    stem.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    for name, value in values.items():
        print(f"{name:>24}  {value:.6g}" if isinstance(value, float) else f"{name:>24}  {value}")
    print(f"numbers and samples: {stem}.json, {stem}.png")


class Evaluator:
    """Extractors and references, loaded once for all evaluations of a run.

    Raises: FileNotFoundError or ValueError naming what cannot be loaded.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._train = open_images(config, ranks, "train")
        self._extractors = [
            build_feature_extractor(name, config.eval.inception_weights).to(ranks.device)
            for name in config.eval.features
        ]
        self._references = [self._reference(extractor) for extractor in self._extractors]
        self._clip = load_clip(config.conditioner) if config.eval.clip_score else None
        order = rng.generator(config.eval.seed, Purpose.choice, 0, 0).permutation(
            self._train.num_samples
        )
        chosen = np.resize(order, config.eval.num_samples)
        self._prompts = self._train.captions(chosen)

    def protocol(self) -> str:
        """Hash of all that the numbers depend on beside the weights."""
        whole = describe(self._config)
        parts = {name: whole[name] for name in ("eval", "sampler", "autoencoder", "conditioner")}
        parts["data"] = self._train.manifest.hash
        parts["extractors"] = [extractor.fingerprint for extractor in self._extractors]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def baselines(self) -> dict[str, float]:
        """Fréchet distance of real validation images: about what perfect samples would have.

        Empty where the experiment keeps no validation images.
        """
        try:
            size_bytes(join(self._config.data.val, FILE_NAME))
        except FileNotFoundError:
            return {}
        validation = open_images(self._config, self._ranks, "val")
        values: dict[str, float] = {"floor/num_samples": validation.num_samples}
        for extractor, reference in zip(self._extractors, self._references, strict=True):
            moments = self._moments(extractor, validation)
            values[f"floor/fd_{extractor.name}"] = frechet_distance(moments, reference)
        return values

    @torch.inference_mode()
    def evaluate(self, pipeline: Pipeline) -> Evaluation:
        """Draw eval.num_samples images and measure them; collective."""
        config = self._config
        moments = [
            GaussianMoments(extractor.num_features, self._ranks.device)
            for extractor in self._extractors
        ]
        clip_score = None if self._clip is None else self._clip_score()
        for part in self._parts(config.eval.num_samples, "samples"):
            prompts = [self._prompts[i] for i in part]
            images = pipeline.draw(prompts, part, config.eval.seed).to(self._ranks.device)
            for extractor, total in zip(self._extractors, moments, strict=True):
                total.update(extractor(images))
            if clip_score is not None:
                clip_score.update(images, prompts)
        values: dict[str, float] = {"num_samples": config.eval.num_samples}
        for extractor, total, reference in zip(
            self._extractors, moments, self._references, strict=True
        ):
            self._ranks.sum_(total.state())
            values[f"fd_{extractor.name}"] = frechet_distance(total, reference)
        if clip_score is not None:
            self._ranks.sum_(clip_score.state())
            values |= clip_score.compute()
        return Evaluation(values, self._picture(pipeline))

    def _picture(self, pipeline: Pipeline) -> Tensor:
        """The fixed prompts with seeds 0, 1, …, beyond those of the measured samples."""
        prompts = self._config.eval.prompts or self._prompts[: GRID_COLUMNS**2]
        images = pipeline.draw(prompts, range(len(prompts)), self._config.eval.seed + 1)
        return grid(images, GRID_COLUMNS)

    def _clip_score(self) -> ClipScore:
        assert self._clip is not None
        clip, device = self._clip, self._ranks.device
        return ClipScore(
            clip.model.to(device),
            clip.tokenizer,
            clip.image_size,
            clip.image_mean,
            clip.image_std,
            device,
        )

    def _reference(self, extractor: FeatureExtractor) -> GaussianMoments:
        """Moments of the training set, made once and kept beside it."""
        identity = {
            "features": str(extractor.name),
            "fingerprint": extractor.fingerprint,
            "dataset": f"{self._train.manifest.hash}/{self._config.data.image_size}",
        }
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        path = Path(self._config.data.dir) / "references" / f"{extractor.name}-{name}.safetensors"
        if not path.exists():
            moments = self._moments(extractor, self._train)
            if self._ranks.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_moments(path, moments, **identity)
            self._ranks.barrier()
        return load_moments(path, **identity)

    def _moments(self, extractor: FeatureExtractor, images: ImageStream) -> GaussianMoments:
        total = GaussianMoments(extractor.num_features, self._ranks.device)
        for part in self._parts(images.num_samples, f"{extractor.name} features"):
            batch = images.read(np.asarray(part))
            total.update(extractor(to_uint8(batch.arrays["images"]).to(self._ranks.device)))
        self._ranks.sum_(total.state())
        return total

    def _parts(self, count: int, label: str) -> Iterator[list[int]]:
        """This rank's share of 0 … count-1, in batches, with a progress bar."""
        parts = list(self._ranks.parts(count, self._config.eval.batch_size))
        yield from tqdm(parts, label, leave=False, disable=None if self._ranks.is_main else True)
