"""Training the denoiser on stored latents, with its condition dropped now and then."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.stream import Batch
from models import autoencoder, conditioners
from models.attention import Context, choose_attention
from models.autoencoder import load_autoencoder, sample_posterior
from models.conditioners import Text, build_conditioner
from models.convert import load_unet
from models.diffusion import Diffusion
from models.unet import UNet2DCondition, attention_shapes
from trainer import rng
from trainer.compilation import compile_blocks
from trainer.config import Config, Precision
from trainer.distributed import Ranks
from trainer.evaluator import Evaluator
from trainer.pipeline import LatentDiffusion, LatentScale, Pipeline
from trainer.rng import Purpose
from trainer.streams import open_latents
from trainer.tasks import Evaluation, Loss, memory_format

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
        torch.manual_seed(config.run.seed)
        self._conditioner = build_conditioner(config.conditioner).to(ranks.device)
        self._null_context = self._conditioner([None])
        self._scale = self._check_latents()
        trained = self._conditioner if self._conditioner.trainable else None
        unet = UNet2DCondition(config.unet)
        if config.unet.weights:
            load_unet(unet, config.unet, Path(config.unet.weights))
        module = LatentDiffusion(unet, trained).to(ranks.device)
        if config.train.compile:
            compile_blocks(module)
        self.modules: dict[str, nn.Module] = {"denoiser": module}
        chosen = self._choose_attention()
        if ranks.is_main:
            print(chosen, flush=True)
        self._diffusion = Diffusion(config.diffusion).to(ranks.device)
        self._evaluator = Evaluator(config, ranks)

    def _choose_attention(self) -> str:
        """See models.attention.choose_attention."""
        unet, train = self._config.unet, self._config.train
        dtype = torch.bfloat16 if train.precision is Precision.bf16 else torch.float32
        side = self._config.data.image_size // self._config.autoencoder.downsample_factor
        null = self._null_context
        shapes = attention_shapes(
            unet,
            train.micro_batch_size,
            side,
            0 if null is None else null.tokens.shape[1],
            masked=null is not None and null.mask is not None,
        )
        return choose_attention(unet.attention_backend, self._ranks.device, dtype, shapes)

    def _check_latents(self) -> LatentScale:
        info = self.stream.manifest.latents
        assert info is not None
        text = self._conditioner if self._config.data.store_text else None
        if info.encoder != autoencoder.fingerprint(self._autoencoder):
            other = "autoencoder than autoencoder.weights"
        elif isinstance(text, Text) and info.text_encoder != conditioners.fingerprint(text):
            other = "text encoder than conditioner.pretrained"
        else:
            other = ""
        if other:
            raise ValueError(
                f"data.latents: {self._config.data.latents} was made by another {other}; "
                "choose that one, or another data.latents and run "
                f"python -m trainer.precompute +experiment={self._config.run.experiment}"
            )
        return LatentScale(info.mean, info.std)

    def state(self) -> dict[str, Any]:
        """What sampling needs to know of the data."""
        return {"latent_scale": asdict(self._scale)}

    def load(self, state: dict[str, Any]) -> None:
        """The latents' manifest has said it."""

    def turns(self, step: int) -> Sequence[str]:
        """One module, at every step."""
        return tuple(self.modules)

    def losses(
        self, name: str, model: nn.Module, micro_batches: Sequence[Batch], step: int
    ) -> Iterator[Loss]:
        """See loss."""
        for batch in micro_batches:
            yield self.loss(model, batch)

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Weighted squared error of the prediction, averaged over the micro batch."""
        latents = self._scale.normalise(self._latents(batch))
        noise = self._noise(batch, latents.shape[1:])
        uniform = torch.from_numpy(
            rng.uniform(self._config.run.seed, Purpose.timestep, batch.epoch, batch.index)
        )
        timesteps = self._diffusion.schedule.draw(uniform).to(self._ranks.device)
        noisy = self._diffusion.add_noise(latents, noise, timesteps)
        noisy = noisy.contiguous(memory_format=memory_format(self._config.train))
        prediction = module(noisy, timesteps, self._condition(batch))
        target = self._diffusion.target(latents, noise, timesteps)
        errors = (prediction.float() - target).square().flatten(1).mean(1)
        mean = (self._diffusion.loss_weight(timesteps) * errors).mean()
        sums = {"train/loss": (mean.detach(), torch.ones_like(mean))}
        bins = (uniform * TIMESTEP_BINS).long().to(self._ranks.device)
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

    def evaluate(
        self, weights: dict[str, Tensor], stopping: Callable[[], bool]
    ) -> Evaluation | None:
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
        return self._evaluator.evaluate(pipeline, stopping)

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """The last checkpoint is what the run is for."""
        if self._ranks.is_main:
            yield f"trained: {folder / 'checkpoints'}; samples: {folder / 'samples'}"

    def _latents(self, batch: Batch) -> Tensor:
        """A fresh draw from the stored posterior at every visit: [b, C, h, w]."""
        moments = batch.arrays["moments"].to(self._ranks.device, non_blocking=True).float()
        return sample_posterior(moments, self._normal(Purpose.posterior, batch, moments.shape[2:]))

    def _noise(self, batch: Batch, shape: torch.Size) -> Tensor:
        """Standard normal; offset noise (Guttenberg 2023) then moves whole channels."""
        noise = self._normal(Purpose.noise, batch, shape)
        if self._config.diffusion.offset_noise > 0:
            offsets = self._normal(Purpose.offset_noise, batch, shape[:1])
            noise = noise + self._config.diffusion.offset_noise * offsets[:, :, None, None]
        return noise

    def _condition(self, batch: Batch) -> Context | list[str | None] | None:
        """Context of the captions, or of nothing where the condition is dropped."""
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
        return self._stored_condition(batch.arrays["text"], torch.from_numpy(dropped))

    def _stored_condition(self, text: Tensor, dropped: Tensor) -> Context:
        """text: [b, T, D] as stored; dropped: [b] bool."""
        null = self._null_context
        assert isinstance(self._conditioner, Text)
        assert null is not None
        tokens = text.to(self._ranks.device, non_blocking=True).float()
        found, gone = self._conditioner.restore(tokens), dropped.to(self._ranks.device)[:, None]
        mask = None
        if found.mask is not None and null.mask is not None:
            mask = torch.where(gone, null.mask, found.mask)
        return Context(torch.where(gone[:, :, None], null.tokens, found.tokens), mask)

    def _normal(self, purpose: Purpose, batch: Batch, shape: torch.Size) -> Tensor:
        draws = rng.normal(self._config.run.seed, purpose, batch.epoch, batch.index, shape)
        return torch.from_numpy(draws).to(self._ranks.device, non_blocking=True)
