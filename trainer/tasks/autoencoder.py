"""Training a first stage: reconstruct the image convincingly, from latents that are simple."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.image_stream import ImageStream
from data.stream import Batch
from models.autoencoder import Reconstruction, build_autoencoder
from models.config import AutoencoderKind, PerceptualFeatures
from models.convert import load_first_stage
from models.first_stage_loss import (
    LikelihoodFirstStage,
    ReconstructionError,
    negative_log_likelihood,
)
from models.vq import code_counts, codebook_use
from trainer import rng
from trainer.compilation import compile_blocks
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.images import grid, to_uint8
from trainer.metrics.extractors import build_feature_extractor, load_eval_clip
from trainer.metrics.reconstruction import ReconstructionMetrics
from trainer.rng import Purpose
from trainer.streams import open_images
from trainer.tasks import Evaluation, Loss, averaged, memory_format
from trainer.tasks.adversary import Adversary

PICTURES = 8
FIRST_STAGE, DISCRIMINATOR = "first_stage", "discriminator"


class AutoencoderTask:
    """A first stage (Rombach et al. 2022, section 3.1), and its discriminator if there is one.

    Raises: ValueError or FileNotFoundError naming the config path of weights that cannot be had.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        torch.manual_seed(config.run.seed)
        options, loss = config.autoencoder, config.autoencoder.loss
        autoencoder = build_autoencoder(options)
        if options.weights:
            load_first_stage(autoencoder, Path(options.weights))
        module = LikelihoodFirstStage(autoencoder, learn_log_variance=loss.learn_log_variance)
        module.to(ranks.device)
        self.modules: dict[str, nn.Module] = {FIRST_STAGE: module}
        self._error = ReconstructionError(loss).to(ranks.device)
        self._adversary: Adversary | None = None
        if loss.gan_weight:
            self._adversary = Adversary(config, ranks, autoencoder.decoder.conv_out)
            self.modules[DISCRIMINATOR] = self._adversary.module
        if config.train.compile:
            compile_blocks(module)
        self._penalty = self._weighted_penalty()
        self.stream = open_images(config, ranks, "train")
        self._validation: ImageStream = open_images(config, ranks, "val")
        self._extractors = [
            build_feature_extractor(name, config.eval, lambda: load_eval_clip(config)).to(
                ranks.device
            )
            for name in config.eval.features
        ]

    def _weighted_penalty(self) -> tuple[str, float]:
        """Name and weight of what the kind of latents adds to the mean error of a pixel's value."""
        options, side = self._config.autoencoder, self._config.data.image_size
        if options.kind is AutoencoderKind.vq:
            return "codebook", options.loss.codebook_weight
        return "kl", options.loss.kl_weight / (options.in_channels * side**2)

    def state(self) -> dict[str, Any]:
        """What the weights do not say."""
        return {} if self._adversary is None else {"adversary": self._adversary.state()}

    def load(self, state: dict[str, Any]) -> None:
        """See state."""
        if self._adversary is not None:
            self._adversary.load(state["adversary"])

    def turns(self, step: int) -> Sequence[str]:
        """The first stage, then the discriminator once it plays."""
        playing = self._adversary is not None and self._adversary.plays(step)
        return [FIRST_STAGE, DISCRIMINATOR] if playing else [FIRST_STAGE]

    def losses(
        self, name: str, model: nn.Module, micro_batches: Sequence[Batch], step: int
    ) -> Iterator[Loss]:
        """The first stage's losses, or the discriminator's of the reconstructions they made."""
        adversary = self._adversary
        if adversary is None or not adversary.plays(step):
            for batch in micro_batches:
                yield self._loss(model, batch, None)
        elif name == FIRST_STAGE:
            adversary.begin_turn()
            for batch in micro_batches:
                yield self._loss(model, batch, adversary)
            adversary.end_turn()
        else:
            yield from adversary.losses(model)

    def _loss(self, model: nn.Module, batch: Batch, adversary: Adversary | None) -> Loss:
        """Of the first stage, averaged over a micro batch."""
        images = self._on_device(batch.arrays["images"])
        reconstruction: Reconstruction
        reconstruction, log_variance = model(images, self._noise(batch))
        parts: dict[str, Tensor] = {}

        def error_of(pixels: Tensor) -> Tensor:
            error, found = self._error(images, pixels)
            parts.update({f"loss_{name}": part for name, part in found.items()})
            return error

        if adversary is None:
            error, adversarial = error_of(reconstruction.images), 0.0
        else:
            error, adversarial, numbers = adversary.judge(
                images, reconstruction.images, error_of, log_variance
            )
            parts |= numbers
        name, weight = self._penalty
        penalty = reconstruction.penalty.float()
        likelihood = negative_log_likelihood(error, log_variance.float())
        mean = likelihood + weight * penalty + adversarial
        parts |= {"loss": mean, "log_variance": log_variance, name: penalty}
        return Loss(mean, averaged(parts))

    def _noise(self, batch: Batch) -> Tensor:
        """What latents are drawn with: [b, C, h, w]."""
        side = self._config.data.image_size // self._config.autoencoder.downsample_factor
        shape = (self._config.autoencoder.latent_channels, side, side)
        seed, purpose = self._config.run.seed, Purpose.posterior
        noise = rng.normal(seed, purpose, batch.epoch, batch.index, shape)
        return self._on_device(torch.from_numpy(noise))

    def baselines(self) -> dict[str, float]:
        """A reconstruction has none."""
        return {}

    @torch.inference_mode()
    def evaluate(self, weights: dict[str, Tensor], stopping: Callable[[], bool]) -> Evaluation:
        """Fidelity of the validation images' reconstructions, and use of the codebook, if any.

        The picture shows the first few images, above their reconstructions.
        """
        with torch.device("meta"):
            module = build_autoencoder(self._config.autoencoder)
        module.load_state_dict(_of_autoencoder(weights), assign=True)
        codes = torch.zeros(self._config.autoencoder.num_embeddings, dtype=torch.float64)
        metrics, count = self._new_metrics(), self._validation.num_samples
        size = self._config.eval.batch_size
        first = min(PICTURES, count)
        shown: list[Tensor] = []
        for start in range(self._ranks.rank * size, count, self._ranks.world_size * size):
            batch = self._validation.read(np.arange(start, min(start + size, count)))
            images = self._on_device(batch.arrays["images"], torch.float32)
            reconstruction: Reconstruction = module(images, None)
            metrics.update(images, reconstruction.images)
            if reconstruction.codes is not None:
                codes += code_counts(reconstruction.codes, len(codes)).cpu()
            if start == 0:
                shown = [to_uint8(images[:first]), to_uint8(reconstruction.images[:first])]
        self._ranks.sum_(metrics.state() | {"codes": codes})
        values = metrics.compute()
        if self._config.autoencoder.kind is AutoencoderKind.vq:
            values |= codebook_use(codes)
        picture = grid(torch.cat(shown), columns=first) if shown else torch.zeros(3, 1, 1)
        return Evaluation(values, picture)

    def _new_metrics(self) -> ReconstructionMetrics:
        perceptual, features = self._error.perceptual, self._error.config.perceptual_features
        is_lpips = features is PerceptualFeatures.vgg16
        name = "lpips" if is_lpips else f"perceptual_{features}"
        return ReconstructionMetrics(
            self._extractors,
            None if perceptual is None else (name, perceptual),
            self._ranks.device,
        )

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """Write the averaged weights in half precision, ready for autoencoder.weights."""
        if self._ranks.is_main:
            path = folder / "autoencoder.safetensors"
            trained = _of_autoencoder(weights)
            save_file({name: value.half() for name, value in trained.items()}, path)
            yield f"weights for autoencoder.weights: {path}"

    def _on_device(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or next(self.modules[FIRST_STAGE].parameters()).dtype
        # DeepSpeed broadcasts contiguous weights only; convolutions follow their input's layout
        layout = memory_format(self._config.train)
        return values.to(self._ranks.device, dtype, non_blocking=True, memory_format=layout)


def _of_autoencoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are the autoencoder's own, by its names."""
    prefix = "autoencoder."
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
