"""The task of a first stage: an autoencoder of images with regularised latents."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.streams.images import ImageStream
from data.streams.stream import Batch
from models.config import AutoencoderKind
from models.first_stage.autoencoder import build_autoencoder
from models.first_stage.codebook import code_counts, codebook_use
from models.first_stage.first_stage import Reconstruction
from models.first_stage.loss import (
    LikelihoodFirstStage,
    ReconstructionError,
    negative_log_likelihood,
)
from models.first_stage.memory import activation_bytes
from models.first_stage.perceptual import perceptual_name
from models.weights.compvis import load_first_stage
from trainer.checkpoints.tensors import write_tensors
from trainer.config import Config
from trainer.engine.compilation import compile_blocks
from trainer.metrics.extractors import build_extractors
from trainer.metrics.feature_set import batches
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.reconstruction import ReconstructionMetrics
from trainer.metrics.result import Evaluation
from trainer.pictures.png import grid, to_uint8
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.progress import Stopping
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import Purpose
from trainer.runtime.slices import slice_size
from trainer.streams import open_images
from trainer.train.adversary import AdversarialStep, Adversary
from trainer.train.task import (
    Frozen,
    Loss,
    StepPlan,
    Trained,
    TrainingTask,
    Turn,
    Weights,
    as_sums,
    memory_format,
    shapes_only,
)

PICTURES = 8
"""Number of images that an evaluation shows with their reconstructions."""
FIRST_STAGE, DISCRIMINATOR = "first_stage", "discriminator"


class FirstStageLoss:
    """Negative log-likelihood of the images, penalty on the latents and adversarial term, summed.

    Rombach et al. 2022, section 3.1 and equation 25.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self.error = ReconstructionError(config.autoencoder.loss).to(device)
        options, side = config.autoencoder, config.data.image_size
        # the error is a mean over pixel values, so the penalty is divided by their number, too
        if options.kind is AutoencoderKind.vq:
            self._penalty, self._weight = "codebook", options.loss.codebook_weight
        else:
            weight = options.loss.kl_weight / (options.in_channels * side**2)
            self._penalty, self._weight = "kl", weight

    def __call__(
        self, model: nn.Module, batch: Batch, adversarial_step: AdversarialStep | None = None
    ) -> Loss:
        """Compute the loss of one micro batch.

        model: a LikelihoodFirstStage, or its engine; batch: images [b, 3, H, W] in [-1, 1], and
        what `draw` gave for it, on the model's device; adversarial_step: None in steps without an
        adversarial term.
        """
        dtype, layout = next(model.parameters()).dtype, memory_format(self._config.train)
        # DeepSpeed needs contiguous weights; convolutions adopt the layout of their input
        images = batch.arrays["images"].to(dtype, memory_format=layout)
        noise = batch.drawn["posterior"].to(dtype, memory_format=layout)
        reconstruction: Reconstruction
        reconstruction, log_variance = model(images, noise)
        parts: dict[str, Tensor] = {}

        def error_of(pixels: Tensor) -> Tensor:
            error, found = self.error(images, pixels)
            parts.update({f"loss_{name}": part for name, part in found.items()})
            return error

        if adversarial_step is None:
            error, adversarial = error_of(reconstruction.images), 0.0
        else:
            error, adversarial, numbers = adversarial_step.terms(
                images, reconstruction.images, error_of, log_variance
            )
            parts |= numbers
        penalty = reconstruction.penalty.float()
        likelihood = negative_log_likelihood(error, log_variance.float())
        mean = likelihood + self._weight * penalty + adversarial
        parts |= {"loss": mean, "log_variance": log_variance, self._penalty: penalty}
        return Loss(mean, as_sums(parts))

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Draw the normal values that sample latents from posteriors: [b, C, h, w] on the CPU."""
        side = self._config.data.image_size // self._config.autoencoder.downsample_factor
        shape = (self._config.autoencoder.latent_channels, side, side)
        seed, purpose = self._config.run.seed, Purpose.posterior
        noise = rng.normal(seed, purpose, batch.epoch, batch.index, shape)
        return {"posterior": torch.as_tensor(noise)}


class FirstStageTask(TrainingTask):
    """A first stage (Rombach et al. 2022, section 3.1), and its discriminator if there is one."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        module: LikelihoodFirstStage,
        adversary: Adversary | None,
        extractors: Sequence[FeatureExtractor],
    ) -> None:
        """extractors: networks of the evaluations, on the CPU; an evaluation moves them."""
        self._config = config
        self._ranks = ranks
        self._adversary = adversary
        self._loss = FirstStageLoss(config, ranks.device)
        self.trained = {FIRST_STAGE: Trained(module, averaged=True)}
        if adversary is not None:
            self.trained[DISCRIMINATOR] = Trained(adversary.module)
        self.stream = open_images(config, ranks, "train")
        self.stream.draw, self.stream.pinned = self._loss.draw, ranks.device.type == "cuda"
        self._validation: ImageStream | None = None
        if config.eval.every:
            self._validation = open_images(config, ranks, "val")
        self._extractors = extractors

    def turns(self, step: int) -> Sequence[Turn]:
        """Return the turn of the first stage and, if step `step` has one, of the discriminator."""
        if self._adversary is None or not self._adversary.is_active(step):
            return [Turn(FIRST_STAGE, self._loss)]
        step_terms = AdversarialStep(self._adversary)
        loss = partial(self._loss, adversarial_step=step_terms)
        return [
            Turn(FIRST_STAGE, loss, step_terms.close),
            Turn(DISCRIMINATOR, step_terms.discriminator_loss),
        ]

    def state(self) -> dict[str, Any]:
        """Return the weight of the adversarial term for the next step, if there is an adversary."""
        return {} if self._adversary is None else {"adversary": self._adversary.weight.item()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the weight of the adversarial term."""
        if self._adversary is not None:
            self._adversary.weight.fill_(state["adversary"])

    @torch.inference_mode()
    def evaluate(
        self, weights: Weights, stopping: Stopping, *, baselines: bool
    ) -> Evaluation | None:
        """Measure the reconstructions of the validation images, and the use of a codebook.

        The picture shows PICTURES images above their reconstructions. There are no baselines.
        """
        assert self._validation is not None
        with torch.device("meta"):
            module = build_autoencoder(self._config.autoencoder)
        module.load_state_dict(_of_autoencoder(weights), assign=True)
        codes = torch.zeros(self._config.autoencoder.num_embeddings, dtype=torch.float64)
        metrics, count = self._new_metrics(), self._validation.num_samples
        columns = min(PICTURES, count)
        shown: list[Tensor] = []
        config, device = self._config, self._ranks.device
        pixels, width = config.data.image_size**2, torch.float32.itemsize
        each = activation_bytes(config.autoencoder, pixels, width)
        with on_device([module, *self._extractors], device):
            for part in batches(count, config.eval.batch_size, self._ranks):
                if stopping("evaluation"):
                    return None
                if not part:
                    continue
                whole = self._images(self._validation, part)
                for images in torch.split(whole, slice_size(each, device)):
                    reconstruction: Reconstruction = module(images, None)
                    metrics.update(images, reconstruction.images)
                    if reconstruction.codes is not None:
                        codes += code_counts(reconstruction.codes, len(codes)).cpu()
                    if part.start == 0:
                        pair = torch.stack([images, reconstruction.images])
                        shown.append(to_uint8(pair[:, :columns]))
        self._ranks.sum_(metrics.state() | {"codes": codes})
        values = metrics.compute()
        if self._config.autoencoder.kind is AutoencoderKind.vq:
            values |= codebook_use(codes)
        if not shown:
            return Evaluation(values, torch.zeros(3, 1, 1))
        pairs = torch.cat(shown, dim=1)[:, :columns]
        return Evaluation(values, grid(pairs.flatten(0, 1), columns=columns))

    def _images(self, stream: ImageStream, part: range) -> Tensor:
        """Read images to the device: [b, 3, H, W] float32 in [-1, 1]."""
        images = stream.read(np.arange(part.start, part.stop)).arrays["images"]
        layout = memory_format(self._config.train)
        return images.to(self._ranks.device, torch.float32, memory_format=layout)

    def _new_metrics(self) -> ReconstructionMetrics:
        perceptual, features = (
            self._loss.error.perceptual,
            self._loss.error.config.perceptual_features,
        )
        return ReconstructionMetrics(
            self._extractors,
            None if perceptual is None else (perceptual_name(features), perceptual),
            self._ranks.device,
        )

    def finish(self, averaged: Callable[[], Weights], folder: Path) -> str:
        """Write the averaged weights for autoencoder.weights, in half precision."""
        path = folder / "autoencoder.safetensors"
        weights = averaged()
        if self._ranks.is_main:
            halves = {name: value.half() for name, value in _of_autoencoder(weights).items()}
            write_tensors(path, halves)
        return f"weights for autoencoder.weights: {path}"


def build_first_stage(config: Config, ranks: Ranks) -> FirstStageTask:
    """Open the images and build the task with its initial weights.

    Raises: ValueError or OSError naming the config path of data or weights that cannot be loaded.
    """
    rng.seed_torch(config.run.seed)
    module = untrained(config)
    if config.autoencoder.weights:
        if not Path(config.autoencoder.weights).is_file():
            raise FileNotFoundError(
                f"autoencoder.weights: no file at {config.autoencoder.weights}: add "
                "autoencoder.weights='' to train the first stage from scratch"
            )
        load_first_stage(module.autoencoder, Path(config.autoencoder.weights))
    module.to(ranks.device)
    adversary = None
    if config.autoencoder.loss.gan_weight:
        adversary = Adversary(config, ranks, module.autoencoder.decoder.conv_out)
    if config.train.compile:
        compile_blocks(module)
    extractors = build_extractors(config, config.eval.features if config.eval.every else ())
    return FirstStageTask(config, ranks, module, adversary, list(extractors.values()))


def plan_first_stage(config: Config) -> StepPlan:
    """Plan a step of the first stage, without the perceptual network and the discriminator."""
    options, side = config.autoencoder, config.data.image_size
    alone = replace(options, loss=replace(options.loss, perceptual_weight=0.0))
    step_loss = FirstStageLoss(replace(config, autoencoder=alone), torch.device("cpu"))

    def loss(module: nn.Module, micro_batch: int) -> Tensor:
        images = torch.empty(micro_batch, options.in_channels, side, side)
        batch = shapes_only(images=images)
        batch.drawn = step_loss.draw(batch)
        return step_loss(module, batch).mean

    left_out = options.loss.perceptual_weight or options.loss.gan_weight
    return StepPlan(
        build_module=lambda: untrained(config),
        loss=loss,
        frozen=Frozen(),
        sample_bytes=options.in_channels * side**2,  # uncompressed
        checkpointing=False,
        not_counted=("the perceptual network and the discriminator",) if left_out else (),
    )


def untrained(config: Config) -> LikelihoodFirstStage:
    """Build the trained module with random weights."""
    return LikelihoodFirstStage(
        build_autoencoder(config.autoencoder),
        learn_log_variance=config.autoencoder.loss.learn_log_variance,
    )


def _of_autoencoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the autoencoder, by its own parameter names."""
    prefix = "autoencoder."
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
