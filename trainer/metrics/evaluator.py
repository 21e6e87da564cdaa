"""Evaluate a model: draw samples, extract features, compare them with features of real images.

Prompts are captions of training images. Batches do not depend on the number of ranks, and rank 0
compares. Therefore the numbers do not depend on the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.shards.manifest import FILE_NAME
from data.storage.atomic import write_atomic
from data.storage.files import join_location, size_bytes
from data.streams.images import ImageStream
from models.conditioning.given import Given
from models.config.conditioning import CONDITIONERS
from trainer.config import Config
from trainer.config.choices import Features
from trainer.metrics.clip_score import ClipScore
from trainer.metrics.compare import compare, needs_rows
from trainer.metrics.extractors import build_extractors, load_eval_clip
from trainer.metrics.feature_set import FeatureCollector, FeatureSet, batches
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.fit import Batch, build_fit
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.image_folder import ImageFolder
from trainer.metrics.prompts import Prompts
from trainer.metrics.protocol import Protocol, folder_protocol, samples_protocol
from trainer.metrics.references import (
    ImageBatch,
    References,
    open_training_images,
    read_images,
)
from trainer.metrics.result import Evaluation
from trainer.pictures.grids import about_grid
from trainer.pictures.png import from_uint8, grid, save_png, to_uint8
from trainer.pipeline import Pipeline
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.products import fp32_products
from trainer.runtime.progress import Stopping, never, progress_bar
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import Purpose
from trainer.streams import open_images

GRID_COLUMNS, PAIRED_COLUMNS = 4, 8
"""Most images side by side: in a grid of prompts, and of conditions beside their samples."""

Values = dict[str, float | str]


def build_evaluator(config: Config, ranks: Ranks) -> "Evaluator":
    """Open the training images, load networks, and references if all exist; collective.

    Raises: FileNotFoundError or ValueError that names the config path of a missing file.
    """
    images, own = open_training_images(config, ranks), config.eval
    load_clip = cache(partial(load_eval_clip, config))
    scored = [Features.open_clip] if own.clip_score else []
    extractors = build_extractors(config, [*own.features, *scored], load_clip)
    references = References(config, ranks, images, extractors)
    references.load_if_made()
    parts = batches(own.num_samples, own.batch_size, ranks)
    conditions = images
    if CONDITIONERS[config.conditioner.kind].reads:
        conditions = open_validation(config, ranks) or images
    clip = load_clip() if own.clip_score else None
    prompts = Prompts(config, ranks, conditions, parts, clip)
    return Evaluator(config, ranks, extractors, references, prompts)


class Evaluator:
    """Measures samples or image files, any number of times; collective.

    Between evaluations the networks are in host memory: the training needs the memory of the GPU.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        extractors: Mapping[Features, FeatureExtractor],
        references: References,
        prompts: Prompts,
    ) -> None:
        self._config, self._ranks = config, ranks
        self._extractors, self._references, self._prompts = extractors, references, prompts

    @property
    def is_paired(self) -> bool:
        """Whether each sample has an image that it should be like."""
        return self._prompts.are_paired

    @property
    def samples_protocol(self) -> Protocol:
        """The protocol of `evaluate`."""
        about = self._references.about()
        conditions = self._prompts.images.manifest.hash if self._prompts.are_paired else ""
        return samples_protocol(
            self._config, self._extractors.values(), about, self._ranks.device, conditions
        )

    @property
    def folder_protocol(self) -> Protocol:
        """The protocol of `evaluate_folder`."""
        compared = [self._extractors[name] for name in self._config.eval.features]
        return folder_protocol(self._config, compared, self._references.about())

    @torch.inference_mode()
    def evaluate(
        self,
        pipeline: Pipeline,
        stopping: Stopping = never,
        keep: Path | None = None,
        *,
        baselines: bool = False,
    ) -> Evaluation | None:
        """Draw eval.num_samples images and measure them; only rank 0 gets numbers.

        stopping: called between batches. keep: a folder for the samples. baselines: whether to
        add the numbers of `baselines`.
        Returns None if asked to stop.
        Raises: ValueError of `References.load_or_make`, or for features that are not finite.
        """
        if not self._references.load_or_make(stopping):
            return None
        floor = self.baselines(stopping) if baselines else {}
        embeddings = None if floor is None else self._prompts.embeddings(stopping)
        if floor is None or embeddings is None:
            return None
        found = self._measure_samples(pipeline, embeddings, stopping, keep, baselines=baselines)
        if found is None:
            return None
        features, values = found
        if not self._ranks.is_main:
            return Evaluation({}, torch.zeros(3, 1, 1, dtype=torch.uint8))
        protocol, count = self.samples_protocol, self._config.eval.num_samples
        values = floor | _about(protocol, count) | self._compare(features) | values
        file = protocol.file(Path(self._config.run.dir))
        picture, about = self._picture(pipeline)
        return Evaluation(values, picture, about, file)

    @torch.inference_mode()
    def evaluate_folder(self, folder: ImageFolder, stopping: Stopping = never) -> Values | None:
        """Measure image files instead of samples; only rank 0 gets numbers.

        stopping: called between batches. Returns None if asked to stop.
        Raises: ValueError that names a damaged file, or of `References.load_or_make`.
        """
        if not self._references.load_or_make(stopping):
            return None
        parts = batches(len(folder), self._config.eval.batch_size, self._ranks)
        with closing(folder.read(parts)) as read:
            images = ((batch, None) for batch in read)
            found = self._measure(images, len(parts), "measuring image files", stopping)
        if found is None or not self._ranks.is_main:
            return None if found is None else {}
        for path, payload in self.folder_protocol.file(Path(self._config.run.dir)).items():
            write_atomic(path, payload)
        return _about(self.folder_protocol, len(folder)) | self._compare(found)

    @torch.inference_mode()
    def baselines(self, stopping: Stopping = never) -> dict[str, float] | None:
        """Measure real validation images: a perfect model has about their Fréchet distance.

        At most eval.num_samples images, because the distance depends on the number of images.
        Returns floor/num_samples and floor/fd_FEATURES; nothing if there are fewer than two
        validation images; None if asked to stop.
        """
        if not self._references.load_or_make(stopping):
            return None
        validation = open_validation(self._config, self._ranks)
        if validation is None or validation.num_samples < 2:
            return {}
        count = min(validation.num_samples, max(self._config.eval.num_samples, 2))
        seed, total = self._config.eval.seed, validation.num_samples
        chosen = np.sort(rng.chosen(seed, Purpose.choice, 2, 0, total, count))
        parts = batches(count, self._config.eval.batch_size, self._ranks)
        with closing(read_images(validation, chosen, parts)) as images:
            found = self._measure(images, len(parts), "measuring validation images", stopping)
        if found is None:
            return None
        values: dict[str, float] = {"floor/num_samples": count}
        for name, reference in self._references.loaded.items():
            distance = frechet_distance(found[name].moments, reference.moments)
            values[f"floor/fd_{name}"] = distance
        return values

    def _measure_samples(
        self,
        pipeline: Pipeline,
        embeddings: list[Tensor],
        stopping: Stopping,
        keep: Path | None,
        *,
        baselines: bool,
    ) -> tuple[dict[Features, FeatureSet], dict[str, float]] | None:
        """Draw the samples; return their features and CLIP score, or None if asked to stop."""
        collectors = self._collectors(self._extractors)
        scored = collectors.get(Features.open_clip) if self._config.eval.clip_score else None
        score = None if scored is None else ClipScore(scored.width, self._ranks.device)
        parts = self._prompts.parts
        measured = [self._extractors[name] for name in self._config.eval.features]
        fit = build_fit(self._config, measured, self._ranks.device, baselines=baselines)
        lent = self._lent(self._extractors, fit.networks if fit else ())
        with lent, self._progress(len(parts), "drawing samples") as bar:
            for number, part in enumerate(parts):
                if stopping("evaluation"):
                    return None
                given = self._prompts.given(part) if part else None
                images = None if given is None else self._draw(pipeline, given, part, keep)
                found = {name: one.update(images) for name, one in collectors.items()}
                if fit is not None and given is not None and images is not None:
                    fit.update(self._compared(pipeline, given, images, found))
                embedded = found.get(Features.open_clip)
                if score is not None and embedded is not None:
                    score.update(embedded, embeddings[number])
                bar.update()
        values: dict[str, float] = {}
        if score is not None:
            self._ranks.sum_(score.state())
            values = score.compute()
        if fit is not None:
            self._ranks.sum_(fit.state())
            values |= fit.compute()
        return {name: one.finish() for name, one in collectors.items()}, values

    def _draw(self, pipeline: Pipeline, given: Given, part: range, keep: Path | None) -> Tensor:
        with fp32_products(tf32=self._config.eval.tf32):
            images = pipeline.draw(given, part, self._config.eval.seed)
        if keep is not None:
            for number, image, prompt in zip(part, images, given.captions, strict=True):
                about = {"prompt": prompt, "seed": self._config.eval.seed, "sample": number}
                save_png(keep / f"{number:06d}.png", image, about)
        return images

    def _compared(
        self,
        pipeline: Pipeline,
        given: Given,
        images: Tensor,
        found: Mapping[Features, Tensor | None],
    ) -> Batch:
        """Return samples with what they are compared with, on the device."""
        features = [found[name] for name in self._config.eval.features]
        height, width = images.shape[2:]
        return Batch(
            given=given,
            images=from_uint8(images.to(self._ranks.device)),
            features=[one for one in features if one is not None],
            inputs=pipeline.conditioner.prepare(given, pipeline.latent_size((height, width))),
            reconstruct=pipeline.reconstruct,
        )

    def _picture(self, pipeline: Pipeline) -> tuple[Tensor, dict[str, object]]:
        """Draw a grid [3, H, W] uint8 with a seed of its own; return it with what its PNG says.

        It has an image for each prompt. For conditions made of images, label maps or boxes, its
        three rows are conditions, samples and images.
        """
        if not self._prompts.are_paired:
            prompts = self._config.eval.prompts or self._prompts.texts[: GRID_COLUMNS**2]
            images = self._drawn(pipeline, Given(prompts))
            columns = min(len(prompts), GRID_COLUMNS)
            return grid(images, columns), about_grid(prompts, columns)
        count = min(PAIRED_COLUMNS, self._config.eval.num_samples)
        given = self._prompts.given(range(count))
        assert given.images is not None
        height, width = given.images.shape[2:]
        conditions = pipeline.conditioner.picture(given, pipeline.latent_size((height, width)))
        conditions = F.interpolate(conditions, (height, width))
        rows = [to_uint8(conditions), self._drawn(pipeline, given), to_uint8(given.images)]
        names = [f"{row} {n + 1}" for row in ("condition", "sample", "image") for n in range(count)]
        return grid(torch.cat(rows), count), about_grid(names, count)

    def _drawn(self, pipeline: Pipeline, given: Given) -> Tensor:
        with fp32_products(tf32=self._config.eval.tf32):
            count = len(given.captions)
            return pipeline.draw(given, range(count), self._config.eval.seed + 1)

    def _measure(
        self, images: Iterable[ImageBatch], rounds: int, phase: str, stopping: Stopping
    ) -> dict[Features, FeatureSet] | None:
        """Collect the features of eval.features; return None if asked to stop."""
        names = self._config.eval.features
        collectors = self._collectors(names)
        with self._lent(names), self._progress(rounds, phase) as bar:
            for batch, kept in images:
                if stopping(phase):
                    return None
                for collector in collectors.values():
                    collector.update(batch, kept)
                bar.update()
        return {name: collector.finish() for name, collector in collectors.items()}

    def _collectors(self, names: Iterable[Features]) -> dict[Features, FeatureCollector]:
        keeps_rows = needs_rows(self._config.eval.metrics)
        return {
            name: FeatureCollector(self._extractors[name], self._ranks, keeps_rows=keeps_rows)
            for name in names
        }

    def _compare(self, found: Mapping[Features, FeatureSet]) -> Values:
        """Compute eval.metrics on rank 0, on its device."""
        values: Values = {}
        with self._lent(self._references.loaded):
            for name, reference in self._references.loaded.items():
                extractor = self._extractors[name]
                values |= compare(self._config.eval, extractor, found[name], reference)
        return values

    def _lent(
        self, names: Iterable[Features], others: Sequence[nn.Module] = ()
    ) -> AbstractContextManager[None]:
        return on_device([*(self._extractors[name] for name in names), *others], self._ranks.device)

    def _progress(self, rounds: int, label: str) -> "tqdm[NoReturn]":
        return progress_bar(rounds, label, "batch", hidden=not self._ranks.is_main)


def open_validation(config: Config, ranks: Ranks) -> ImageStream | None:
    """Open data.val on this rank alone; None if there is no such data set."""
    try:
        size_bytes(join_location(config.data.val, FILE_NAME))
    except FileNotFoundError:
        return None
    return open_images(config, Ranks(0, 1, ranks.device), "val")


def _about(protocol: Protocol, count: int) -> Values:
    return {"num_samples": count, "protocol": protocol.hash}
