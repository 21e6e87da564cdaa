"""Training the denoiser on stored latents, with its condition dropped now and then."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.stream import Batch
from models.attention import probe_attention
from models.autoencoder import fingerprint, load_autoencoder, sample_posterior
from models.conditioners import build_conditioner
from models.diffusion import Diffusion
from models.unet import UNet2DCondition, attention_head_dims
from trainer import rng
from trainer.config import Config, Precision
from trainer.distributed import Ranks
from trainer.evaluation import Evaluator
from trainer.pipeline import LatentDiffusion, LatentScale, Pipeline
from trainer.rng import Purpose
from trainer.streams import open_latents
from trainer.tasks import Evaluation, Loss

TIMESTEP_BINS = 4


class DiffusionTask:
    """Denoising score matching in latent space (Rombach et al. 2022, equations 2 and 3).

    Raises: ValueError naming the config path if the latents are not those of the autoencoder.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self.stream = open_latents(config, ranks)
        self._autoencoder = load_autoencoder(config.autoencoder)
        self._scale = self._check_latents()
        torch.manual_seed(config.run.seed)
        self._conditioner = build_conditioner(config.conditioner).to(ranks.device)
        trained = self._conditioner if self._conditioner.trainable else None
        self.module = LatentDiffusion(UNet2DCondition(config.unet), trained)
        self.module.to(ranks.device)
        if config.train.compile:
            self.module.compile()
        dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
        chosen = probe_attention(ranks.device, dtype, attention_head_dims(config.unet))
        if ranks.is_main:
            print(chosen, flush=True)
        self._diffusion = Diffusion(config.diffusion).to(ranks.device)
        self._evaluator = Evaluator(config, ranks)

    def _check_latents(self) -> LatentScale:
        info = self.stream.manifest.latents
        assert info is not None
        if info.encoder != fingerprint(self._autoencoder):
            raise ValueError(
                f"data.latents: {self._config.data.latents} was made by another autoencoder than "
                "autoencoder.weights; choose that one, or another data.latents and run "
                f"python -m trainer.precompute +experiment={self._config.run.experiment}"
            )
        return LatentScale(info.mean, info.std)

    def state(self) -> dict[str, Any]:
        """What sampling needs to know of the data."""
        return {"latent_scale": asdict(self._scale)}

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Weighted squared error of the prediction, averaged over the micro batch."""
        latents = self._scale.normalise(self._latents(batch))
        noise = self._normal(Purpose.noise, batch, latents.shape[1:])
        timesteps = self._timesteps(batch)
        noisy = self._diffusion.add_noise(latents, noise, timesteps)
        prediction = module(noisy, timesteps, self._condition(batch))
        target = self._diffusion.target(latents, noise, timesteps)
        errors = (prediction.float() - target).square().flatten(1).mean(1)
        mean = (self._diffusion.loss_weight(timesteps) * errors).mean()
        sums = {"train/loss": (mean.detach(), torch.ones_like(mean))}
        bins = timesteps * TIMESTEP_BINS // self._config.diffusion.num_timesteps
        for number in range(TIMESTEP_BINS):
            inside = (bins == number).float()
            sums[f"train/loss_by_timestep/{number}"] = (
                (errors.detach() * inside).sum(),
                inside.sum(),
            )
        return Loss(mean, sums)

    def baselines(self) -> dict[str, float]:
        """See Evaluator.baselines."""
        return self._evaluator.baselines()

    def evaluate(self, weights: dict[str, Tensor]) -> Evaluation:
        """Draw and measure samples of averaged weights."""
        with torch.device("meta"):
            trained = self._conditioner.trainable
            conditioner = build_conditioner(self._config.conditioner) if trained else None
            module = LatentDiffusion(UNet2DCondition(self._config.unet), conditioner)
        module.load_state_dict(weights, assign=True)
        conditioner = conditioner or self._conditioner
        pipeline = Pipeline(
            self._config, module, conditioner, self._autoencoder, self._scale, self._ranks.device
        )
        return self._evaluator.evaluate(pipeline)

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """The last checkpoint is what the run is for."""
        if self._ranks.is_main:
            yield f"trained: {folder / 'checkpoints'}; samples: {folder / 'samples'}"

    def _latents(self, batch: Batch) -> Tensor:
        """A fresh draw from the stored posterior at every visit: [b, C, h, w]."""
        moments = batch.arrays["moments"].to(self._ranks.device, non_blocking=True)
        return sample_posterior(moments, self._normal(Purpose.posterior, batch, moments.shape[2:]))

    def _timesteps(self, batch: Batch) -> Tensor:
        draws = rng.uniform(self._config.run.seed, Purpose.timestep, batch.epoch, batch.index)
        timesteps = (draws * self._config.diffusion.num_timesteps).astype(np.int64)
        return torch.from_numpy(timesteps).to(self._ranks.device)

    def _condition(self, batch: Batch) -> Tensor | list[str | None] | None:
        """Context [b, T, D] of the captions, or of nothing where the condition is dropped."""
        draws = rng.uniform(
            self._config.run.seed, Purpose.condition_dropout, batch.epoch, batch.index
        )
        dropped = draws < self._config.conditioner.cond_drop_prob
        captions = [
            None if gone else text for gone, text in zip(dropped, batch.captions, strict=True)
        ]
        if self._conditioner.trainable:
            return captions
        if "text" not in batch.arrays:
            return self._conditioner(captions)
        context = batch.arrays["text"].to(self._ranks.device, non_blocking=True)
        gone = torch.from_numpy(dropped).to(self._ranks.device)[:, None, None]
        return torch.where(gone, self._conditioner([None]), context)

    def _normal(self, purpose: Purpose, batch: Batch, shape: torch.Size) -> Tensor:
        draws = rng.normal(self._config.run.seed, purpose, batch.epoch, batch.index, shape)
        return torch.from_numpy(draws).to(self._ranks.device, non_blocking=True)
