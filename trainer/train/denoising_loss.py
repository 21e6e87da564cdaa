"""The loss of a denoiser on stored latents (Rombach et al. 2022, equations 2 and 3)."""

import torch
from torch import Tensor, nn

from data.streams.stream import Batch
from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.text import Text
from models.diffusion.process import Diffusion
from models.first_stage.autoencoder import sample_posterior
from models.latent_diffusion import LatentScale
from trainer.config import Config
from trainer.runtime import rng
from trainer.runtime.rng import Purpose
from trainer.train.task import Loss, memory_format

TIMESTEP_BINS = 4
"""The loss is logged by quarters of the timesteps."""


class DenoisingLoss:
    """Weighted squared error of the denoiser's prediction, averaged over a micro batch.

    Latents, noise, timesteps and dropped conditions are functions of (seed, epoch, sample).
    """

    def __init__(
        self, config: Config, scale: LatentScale, conditioner: Conditioner, device: torch.device
    ) -> None:
        """scale: of the latents; conditioner: trained or frozen, on `device`."""
        self._config = config
        self._scale = scale
        self._conditioner = conditioner
        self._device = device
        self._diffusion = Diffusion(config.diffusion).to(device)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute the loss of one micro batch.

        model: a LatentDiffusion, or its engine. batch: `moments` [b, 2, C, h, w], mean and
        log-variance of the posteriors, with captions or with stored tokens `text` [b, T, D].
        """
        latents = self._scale.normalise(self._latents(batch))
        noise = self._noise(batch, latents.shape[1:])
        uniform = torch.as_tensor(
            rng.uniform(self._config.run.seed, Purpose.timestep, batch.epoch, batch.index)
        )
        timesteps = self._diffusion.schedule.draw(uniform).to(self._device)
        noisy = self._diffusion.add_noise(latents, noise, timesteps)
        noisy = noisy.contiguous(memory_format=memory_format(self._config.train))
        prediction = model(noisy, timesteps, self._condition(batch, latents))
        target = self._diffusion.target(latents, noise, timesteps)
        errors = (prediction.float() - target).square().flatten(1).mean(1)
        mean = (self._diffusion.loss_weight(timesteps) * errors).mean()
        sums = {"train/loss": (mean.detach(), torch.ones_like(mean))}
        bins = (uniform * TIMESTEP_BINS).long().to(self._device)
        for number in range(TIMESTEP_BINS):
            inside = (bins == number).float()
            sums[f"train/loss_by_timestep/{number}"] = (
                (errors.detach() * inside).sum(),
                inside.sum(),
            )
        return Loss(mean, sums)

    def _latents(self, batch: Batch) -> Tensor:
        """Sample the stored posteriors, with other noise in each epoch: [b, C, h, w]."""
        posteriors = batch.arrays["moments"].to(self._device, non_blocking=True).float()
        noise = self._normal(Purpose.posterior, batch, posteriors.shape[2:])
        return sample_posterior(posteriors, noise)

    def _noise(self, batch: Batch, shape: torch.Size) -> Tensor:
        """Draw standard normal noise, with offset noise for whole channels (Guttenberg 2023).

        shape: (C, h, w). Returns [b, C, h, w] float32.
        """
        noise = self._normal(Purpose.noise, batch, shape)
        if self._config.diffusion.offset_noise > 0:
            offsets = self._normal(Purpose.offset_noise, batch, shape[:1])
            noise = noise + self._config.diffusion.offset_noise * offsets[:, :, None, None]
        return noise

    def _condition(self, batch: Batch, latents: Tensor) -> Condition | list[str | None]:
        """Return the condition of a micro batch; for a trained conditioner, its captions.

        A dropped caption is None, and has the null condition.
        """
        draws = rng.uniform(
            self._config.run.seed, Purpose.condition_dropout, batch.epoch, batch.index
        )
        dropped = draws < self._config.conditioner.cond_drop_prob
        captions = [
            None if drop else text for drop, text in zip(dropped, batch.captions, strict=True)
        ]
        if self._conditioner.trainable:
            return captions
        height, width = latents.shape[-2:]
        if "text" not in batch.arrays:
            return self._conditioner(captions, (height, width))
        return self._stored_condition(batch.arrays["text"], torch.as_tensor(dropped))

    def _stored_condition(self, text: Tensor, dropped: Tensor) -> Condition:
        """Return the condition of stored tokens; text: [b, T, D]; dropped: [b] bool."""
        assert isinstance(self._conditioner, Text)
        tokens = text.to(self._device, non_blocking=True).float()
        return self._conditioner.restore(tokens, dropped.to(self._device))

    def _normal(self, purpose: Purpose, batch: Batch, shape: torch.Size) -> Tensor:
        draws = rng.normal(self._config.run.seed, purpose, batch.epoch, batch.index, shape)
        return torch.as_tensor(draws).to(self._device, non_blocking=True)
