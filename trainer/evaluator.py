"""How good are the samples: draw them, extract features, compare them with those of real images.

Samples take the captions of training images, drawn once by seed. Ranks share batches that do not
depend on their number, and rank 0 compares: so the numbers do not depend on it either.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.image_stream import ImageStream
from data.manifest import FILE_NAME
from data.read_ahead import with_thread
from data.storage import join, size_bytes
from models.clip import Clip
from trainer import rng
from trainer.config import Config, Features, Metric
from trainer.distributed import Ranks
from trainer.evaluations import write_protocol
from trainer.image_folder import ImageFolder
from trainer.images import grid, save_png, to_uint8
from trainer.metrics.clip_score import ClipScore
from trainer.metrics.compare import compare, needs_rows
from trainer.metrics.extractors import build_feature_extractor, load_eval_clip
from trainer.metrics.feature_set import FeatureCollector, FeatureSet, batches
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.reference import MAX_ROWS, ReferenceSource, load_reference, save_reference
from trainer.pipeline import Pipeline
from trainer.rng import Purpose
from trainer.runs import describe
from trainer.streams import open_images
from trainer.tasks import Evaluation

T = TypeVar("T")

GRID_COLUMNS = 4
DRAWING = ("sampler", "diffusion", "autoencoder", "conditioner")
"""Sections of the config that samples depend on, beside the trained weights."""


class Evaluator:
    """Extractors and references, loaded once for all evaluations of a run; collective.

    References that are missing are made, and kept in eval.references. Networks stay in the memory
    of the host between evaluations: a GPU's is the training's.
    Raises: FileNotFoundError or ValueError naming what cannot be loaded.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        # images are read by number, whatever the batches of a training would be
        self._alone = Ranks(0, 1, ranks.device)
        self._train = open_images(config, self._alone, "train")
        self._batches = batches(config.eval.num_samples, config.eval.batch_size, ranks)
        self._extractors = {
            name: build_feature_extractor(name, config.eval, lambda: self._clip)
            for name in dict.fromkeys(self._networks())
        }
        self._texts = list(self._embed_prompts()) if config.eval.clip_score else []
        self.__dict__.pop("_clip", None)  # with its text tower, which is not needed any more
        self.references = self._load_references()

    def protocol(self) -> dict[str, object]:
        """All that the numbers depend on beside the weights, as JSON values."""
        whole, own = describe(self._config), self._config.eval
        samples: dict[str, object] = {
            "num_samples": own.num_samples,
            "seed": own.seed,
            **{name: whole[name] for name in DRAWING},
        }
        protocol: dict[str, object] = {
            "samples": "the images of a folder" if own.images else samples,
            "image_size": self._config.data.image_size,
            "features": {
                str(name): {"fingerprint": extractor.fingerprint, "resize": extractor.resize}
                for name, extractor in self._extractors.items()
            },
            "metrics": [str(metric) for metric in own.metrics],
            "clip_score": own.clip_score and not own.images,
            "reference": {
                "dataset": self._train.manifest.hash,
                "num_samples": own.reference_samples or self._train.num_samples,
                "seed": own.seed,
            },
        }
        if Metric.kid in own.metrics:
            protocol["kid_subset_size"] = own.kid_subset_size
        return protocol

    @cached_property
    def protocol_hash(self) -> str:
        """What names the protocol wherever a number is logged."""
        text = json.dumps(self.protocol(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def baselines(self) -> dict[str, float]:
        """Fréchet distance of real validation images: about what perfect samples would have.

        Empty where the experiment keeps no validation images.
        """
        try:
            size_bytes(join(self._config.data.val, FILE_NAME))
        except FileNotFoundError:
            return {}
        validation = open_images(self._config, self._alone, "val")
        numbers = np.arange(validation.num_samples)
        found = self._collect(self._read(validation, numbers), self._config.eval.features)
        values: dict[str, float] = {"floor/num_samples": validation.num_samples}
        for name, reference in self.references.items():
            distance = frechet_distance(found[name].moments, reference.moments)
            values[f"floor/fd_{name}"] = distance
        return values

    @torch.inference_mode()
    def evaluate(
        self,
        pipeline: Pipeline,
        stopping: Callable[[], bool] = lambda: False,
        keep: Path | None = None,
    ) -> Evaluation | None:
        """Draw eval.num_samples images and measure them; collective, only rank 0 gets numbers.

        stopping: collective, asked between batches; None is returned where it says yes.
        keep: a folder for the samples.
        """
        config, networks = self._config.eval, list(self._extractors)
        collectors = self._collectors(networks)
        clip_score = ClipScore(self._width, self._ranks.device) if self._texts else None
        with self._on_device(networks):
            for number, part in enumerate(self._progress(self._batches, "samples")):
                if stopping():
                    return None
                images = self._draw(pipeline, part, keep) if part else None
                found = {name: collectors[name].update(images) for name in networks}
                embedded = found.get(Features.open_clip)
                if clip_score is not None and embedded is not None:
                    clip_score.update(embedded, self._texts[number])
            values = self._compare({name: collectors[name].finish() for name in networks})
        if clip_score is not None:
            self._ranks.sum_(clip_score.state())
            values |= clip_score.compute()
        if not self._ranks.is_main:
            return Evaluation({}, torch.zeros(3, 1, 1, dtype=torch.uint8))
        return Evaluation(self._about(config.num_samples) | values, self._picture(pipeline))

    @torch.inference_mode()
    def evaluate_folder(self, folder: ImageFolder) -> dict[str, float | str]:
        """The metrics of image files in the place of samples; collective, rank 0 gets numbers."""
        parts = batches(len(folder), self._config.eval.batch_size, self._ranks)
        images = ((batch, None) for batch in folder.read(parts))
        label = f"{len(parts)} batches"
        found = self._collect(self._progress(images, label, len(parts)), self._config.eval.features)
        return self._about(len(folder)) | self._compare(found) if self._ranks.is_main else {}

    def _about(self, count: int) -> dict[str, float | str]:
        """What the numbers go with; the protocol is written down where they are."""
        write_protocol(Path(self._config.run.dir), self.protocol_hash, self.protocol())
        return {"num_samples": count, "protocol": self.protocol_hash}

    def _networks(self) -> Iterator[Features]:
        yield from self._config.eval.features
        if self._config.eval.clip_score:
            yield Features.open_clip

    @cached_property
    def _clip(self) -> Clip:
        return load_eval_clip(self._config)

    @cached_property
    def _width(self) -> int:
        return self._extractors[Features.open_clip].num_features

    @cached_property
    def _prompts(self) -> list[str]:
        """Of all samples."""
        order = rng.generator(self._config.eval.seed, Purpose.choice, 0, 0).permutation(
            self._train.num_samples
        )
        return self._train.captions(np.resize(order, self._config.eval.num_samples))

    @torch.inference_mode()
    def _embed_prompts(self) -> Iterator[Tensor]:
        """Of this rank's batches: [B, width] each."""
        device = self._ranks.device
        model = self._clip.model.to(device)
        for part in self._batches:
            tokens = self._clip.tokenizer([self._prompts[i] for i in part] or [""]).to(device)
            yield model.encode_text(tokens)[: len(part)].float()
        model.cpu()

    def _draw(self, pipeline: Pipeline, part: range, keep: Path | None) -> Tensor:
        prompts = [self._prompts[i] for i in part]
        images = pipeline.draw(prompts, part, self._config.eval.seed)
        if keep is not None:
            for number, image, prompt in zip(part, images, prompts, strict=True):
                about = {"prompt": prompt, "seed": self._config.eval.seed, "sample": number}
                save_png(keep / f"{number:06d}.png", image, about)
        return images

    def _picture(self, pipeline: Pipeline) -> Tensor:
        """The fixed prompts with seeds 0, 1, …, beyond those of the measured samples."""
        prompts = self._config.eval.prompts or self._prompts[: GRID_COLUMNS**2]
        images = pipeline.draw(prompts, range(len(prompts)), self._config.eval.seed + 1)
        return grid(images, GRID_COLUMNS)

    def _compare(self, found: dict[Features, FeatureSet]) -> dict[str, float | str]:
        values: dict[str, float | str] = {}
        for name, reference in self.references.items():
            extractor = self._extractors[name]
            values |= compare(self._config.eval, extractor, found[name], reference)
        return values

    def _load_references(self) -> dict[Features, FeatureSet]:
        """Of eval.features, on rank 0; made first where they are missing."""
        if "://" in self._config.eval.references:
            raise ValueError(
                f"eval.references={self._config.eval.references}: choose a folder on a disk that "
                "all ranks see"
            )
        folder = Path(self._config.eval.references)
        sources = {
            name: self._source(self._extractors[name]) for name in self._config.eval.features
        }
        missing = [
            name
            for name, source in sources.items()
            # rank 0 decides: a shared disk may show the others another state
            if self._ranks.any(self._ranks.is_main and not source.path(folder).exists())
        ]
        if missing:
            made = self._make_references(missing)
            for name in missing if self._ranks.is_main else []:
                print(f"reference: {save_reference(folder, sources[name], made[name])}", flush=True)
        if not self._ranks.is_main:
            return {}
        return {name: load_reference(folder, source) for name, source in sources.items()}

    def _source(self, extractor: FeatureExtractor) -> ReferenceSource:
        own = self._config.eval
        return ReferenceSource(
            features=str(extractor.name),
            fingerprint=extractor.fingerprint,
            resize=extractor.resize,
            dataset=self._train.manifest.hash,
            image_size=self._config.data.image_size,
            num_samples=min(
                own.reference_samples or self._train.num_samples, self._train.num_samples
            ),
            seed=own.seed,
        )

    def _make_references(self, names: Sequence[Features]) -> dict[Features, FeatureSet]:
        draws = rng.generator(self._config.eval.seed, Purpose.choice, 1, 0)
        total = self._train.num_samples
        count = min(self._config.eval.reference_samples or total, total)
        chosen = np.arange(total)
        if count < total:
            chosen = np.sort(draws.choice(total, count, replace=False))
        kept = chosen
        if count > MAX_ROWS:
            kept = draws.choice(chosen, MAX_ROWS, replace=False)
        return self._collect(self._read(self._train, chosen, kept), names, keeps_rows=True)

    def _read(
        self, images: ImageStream, numbers: np.ndarray, kept: np.ndarray | None = None
    ) -> Generator[tuple[Tensor | None, Tensor | None], None, None]:
        """This rank's batches of images, read ahead: uint8, and which of them are `kept`."""

        def read(part: range) -> tuple[Tensor | None, Tensor | None]:
            if not part:
                return None, None
            batch = images.read(numbers[part.start : part.stop])
            rows = None if kept is None else torch.from_numpy(np.isin(batch.index, kept))
            return to_uint8(batch.arrays["images"]), rows

        parts = batches(len(numbers), self._config.eval.batch_size, self._ranks)
        ahead = with_thread(read, iter(parts), depth=2)
        yield from self._progress(ahead, f"{len(numbers)} real images", len(parts))

    @torch.inference_mode()
    def _collect(
        self,
        images: Iterable[tuple[Tensor | None, Tensor | None]],
        names: Sequence[Features],
        *,
        keeps_rows: bool | None = None,
    ) -> dict[Features, FeatureSet]:
        collectors = self._collectors(names, keeps_rows)
        with self._on_device(names):
            for batch, kept in images:
                for collector in collectors.values():
                    collector.update(batch, kept)
            return {name: collector.finish() for name, collector in collectors.items()}

    def _collectors(
        self, names: Sequence[Features], keeps_rows: bool | None = None
    ) -> dict[Features, FeatureCollector]:
        if keeps_rows is None:
            keeps_rows = needs_rows(self._config.eval.metrics)
        return {
            name: FeatureCollector(self._extractors[name], self._ranks, keeps_rows=keeps_rows)
            for name in names
        }

    @contextmanager
    def _on_device(self, names: Sequence[Features]) -> Iterator[None]:
        """Lend the extractors the training's device."""
        device = self._ranks.device
        try:
            for name in names:
                self._extractors[name].to(device)
            yield
        finally:
            for name in names:
                self._extractors[name].cpu()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _progress(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        hidden = None if self._ranks.is_main else True
        return tqdm(items, label, total, leave=False, disable=hidden)
