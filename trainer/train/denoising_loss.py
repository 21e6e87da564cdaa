"""The loss of a denoiser on stored latents (Rombach et al. 2022, equations 2 and 3)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.streams.stream import Batch
from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Encode, Inputs
from models.conditioning.text import Text
from models.diffusion.process import Diffusion
from models.first_stage.autoencoder import sample_posterior
from models.latent_diffusion import LatentScale
from trainer.config import Config
from trainer.runtime import rng
from trainer.runtime.rng import ConditionDraws, Purpose
from trainer.streams import given_by
from trainer.train.task import Loss, memory_format

TIMESTEP_BINS = 4
"""The loss is logged by quarters of the timesteps."""
GIVEN = "given/"
"""Begins the names of a conditioner's inputs in `Batch.drawn`."""


class DenoisingLoss:
    """Weighted error of the denoiser's prediction, averaged over a micro batch.

    Latents, noise, timesteps and dropped conditions are functions of (seed, epoch, sample). `draw`
    makes them on the CPU, ahead of time. The loss itself then neither copies from the CPU nor waits
    for the device.
    """

    def __init__(
        self,
        config: Config,
        scale: LatentScale,
        conditioner: Conditioner,
        encode: Encode,
        device: torch.device,
    ) -> None:
        """scale: of the latents; conditioner: trained or frozen, on `device`.

        encode: the frozen first stage, for a conditioner with images.
        """
        self._config = config
        self._scale = scale.to(device)
        self._conditioner, self._encode = conditioner, encode
        self._diffusion = Diffusion(config.diffusion).to(device)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Draw for a micro batch: tensors of b rows on the CPU, for `Batch.drawn`."""
        shape = batch.arrays["moments"].shape[2:]
        uniform = torch.as_tensor(self._uniform(Purpose.timestep, batch))
        drawn = {
            "posterior": self._normal(Purpose.posterior, batch, shape),
            "noise": self._noise(batch, shape),
            "timesteps": self._diffusion.schedule.draw(uniform),
            "bins": (uniform * TIMESTEP_BINS).long(),
        }
        if "text" in batch.arrays:
            return drawn | {"dropped": torch.as_tensor(self._dropped(batch))}
        draws = ConditionDraws(self._config.run.seed, batch.epoch, batch.index)
        given = given_by(batch, self._captions(batch), draws)
        height, width = shape[1:]
        inputs = self._conditioner.prepare(given, (height, width))
        return drawn | {GIVEN + name: numbers for name, numbers in inputs.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute the loss of one micro batch.

        model: a LatentDiffusion, or its engine. batch: `moments` [b, 2, C, h, w], mean and
        log-variance of the posteriors, with captions or with stored tokens `text` [b, T, D]; and
        what `draw` gave for it. Its tensors are on the model's device.
        """
        drawn = batch.drawn
        posteriors = batch.arrays["moments"].float()
        latents = self._scale.normalise(sample_posterior(posteriors, drawn["posterior"]))
        noise, timesteps = drawn["noise"], drawn["timesteps"]
        noisy = self._diffusion.add_noise(latents, noise, timesteps)
        noisy = noisy.contiguous(memory_format=memory_format(self._config.train))
        prediction = model(noisy, timesteps, self._condition(batch, latents))
        target = self._diffusion.target(latents, noise, timesteps)
        errors = self._diffusion.errors(prediction, target)
        mean = (self._diffusion.loss_weight(timesteps) * errors).mean()
        sums = {"train/loss": (mean.detach(), torch.ones_like(mean))}
        for number in range(TIMESTEP_BINS):
            inside = (drawn["bins"] == number).float()
            sums[f"train/loss_by_timestep/{number}"] = (
                (errors.detach() * inside).sum(),
                inside.sum(),
            )
        return Loss(mean, sums)

    def _noise(self, batch: Batch, shape: torch.Size) -> Tensor:
        """Draw standard normal noise, with offset noise for whole channels (Guttenberg 2023).

        shape: (C, h, w). Returns [b, C, h, w] float32.
        """
        noise = self._normal(Purpose.noise, batch, shape)
        if self._config.diffusion.offset_noise > 0:
            offsets = self._normal(Purpose.offset_noise, batch, shape[:1])
            noise = noise + self._config.diffusion.offset_noise * offsets[:, :, None, None]
        return noise

    def _condition(self, batch: Batch, latents: Tensor) -> Condition | Inputs:
        """Return the condition of a micro batch, or the inputs of a conditioner that is trained."""
        if "text" in batch.arrays:
            assert isinstance(self._conditioner, Text)
            return self._conditioner.restore(batch.arrays["text"].float(), batch.drawn["dropped"])
        inputs = {
            name.removeprefix(GIVEN): numbers
            for name, numbers in batch.drawn.items()
            if name.startswith(GIVEN)
        }
        inputs = self._conditioner.encoded(inputs, self._encode)
        if self._conditioner.trainable:
            return inputs
        height, width = latents.shape[-2:]
        return self._conditioner(inputs, (height, width))

    def _captions(self, batch: Batch) -> list[str | None]:
        """Return the captions; a dropped one is None, and has the null condition."""
        pairs = zip(self._dropped(batch), batch.captions, strict=True)
        return [None if dropped else caption for dropped, caption in pairs]

    def _dropped(self, batch: Batch) -> NDArray[np.bool_]:
        draws = self._uniform(Purpose.condition_dropout, batch)
        return draws < self._config.conditioner.cond_drop_prob

    def _uniform(self, purpose: Purpose, batch: Batch) -> NDArray[np.float64]:
        return rng.uniform(self._config.run.seed, purpose, batch.epoch, batch.index)

    def _normal(self, purpose: Purpose, batch: Batch, shape: torch.Size) -> Tensor:
        draws = rng.normal(self._config.run.seed, purpose, batch.epoch, batch.index, shape)
        return torch.as_tensor(draws)
