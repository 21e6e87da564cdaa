"""Training a first stage: reconstruct the image, keep the latents near N(0, I)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.image_stream import ImageStream
from data.stream import Batch
from models.autoencoder import Reconstruction, build_autoencoder
from models.config import AutoencoderKind
from models.vq import code_counts, codebook_use
from trainer import rng
from trainer.compilation import compile_blocks
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.images import grid, to_uint8
from trainer.metrics.reconstruction import MeanPsnr
from trainer.rng import Purpose
from trainer.streams import open_images
from trainer.tasks import Evaluation, Loss

PICTURES = 8


class AutoencoderTask:
    """A first stage (Rombach et al. 2022, section 3.1): L1 and L2 error, and its kind's penalty."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        torch.manual_seed(config.run.seed)
        module = build_autoencoder(config.autoencoder).to(ranks.device)
        loss, is_kl = config.autoencoder.loss, config.autoencoder.kind is AutoencoderKind.kl
        self._penalty = ("kl", loss.kl_weight) if is_kl else ("codebook", loss.codebook_weight)
        if config.train.compile:
            compile_blocks(module)
        self.modules: dict[str, nn.Module] = {"autoencoder": module}
        self.stream = open_images(config, ranks, "train")
        self._validation: ImageStream = open_images(config, ranks, "val")

    def state(self) -> dict[str, Any]:
        """The weights say it all."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing else."""

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
        """Mean over the micro batch of the weighted loss."""
        weights = self._config.autoencoder.loss
        images = self._on_device(batch.arrays["images"])
        side = self._config.data.image_size // self._config.autoencoder.downsample_factor
        noise = rng.normal(
            self._config.run.seed,
            Purpose.posterior,
            batch.epoch,
            batch.index,
            (self._config.autoencoder.latent_channels, side, side),
        )
        reconstruction: Reconstruction = module(images, self._on_device(torch.from_numpy(noise)))
        l1 = F.l1_loss(reconstruction.images.float(), images.float())
        l2 = F.mse_loss(reconstruction.images.float(), images.float())
        name, weight = self._penalty
        penalty = reconstruction.penalty.float()
        mean = weights.l1_weight * l1 + weights.l2_weight * l2 + weight * penalty
        one = torch.ones((), device=mean.device)
        parts = {"loss": mean, "loss_l1": l1, "loss_l2": l2, name: penalty}
        return Loss(mean, {f"train/{key}": (part.detach(), one) for key, part in parts.items()})

    def baselines(self) -> dict[str, float]:
        """A reconstruction has none."""
        return {}

    @torch.inference_mode()
    def evaluate(self, weights: dict[str, Tensor], stopping: Callable[[], bool]) -> Evaluation:
        """PSNR of the validation images and use of the codebook, if there is one.

        The picture shows the first few images, above their reconstructions.
        """
        with torch.device("meta"):
            module = build_autoencoder(self._config.autoencoder)
        module.load_state_dict(weights, assign=True)
        codes = torch.zeros(self._config.autoencoder.num_embeddings, dtype=torch.float64)
        psnr, count = MeanPsnr(), self._validation.num_samples
        size = self._config.eval.batch_size
        first = min(PICTURES, count)
        shown: list[Tensor] = []
        for start in range(self._ranks.rank * size, count, self._ranks.world_size * size):
            batch = self._validation.read(np.arange(start, min(start + size, count)))
            images = self._on_device(batch.arrays["images"], torch.float32)
            reconstruction: Reconstruction = module(images, None)
            psnr.update(images, reconstruction.images)
            if reconstruction.codes is not None:
                codes += code_counts(reconstruction.codes, len(codes)).cpu()
            if start == 0:
                shown = [to_uint8(images[:first]), to_uint8(reconstruction.images[:first])]
        self._ranks.sum_(psnr.state() | {"codes": codes})
        metrics = psnr.compute()
        if self._config.autoencoder.kind is AutoencoderKind.vq:
            metrics |= codebook_use(codes)
        picture = grid(torch.cat(shown), columns=first) if shown else torch.zeros(3, 1, 1)
        return Evaluation(metrics, picture)

    def finish(self, weights: dict[str, Tensor], folder: Path) -> Iterator[str]:
        """Write the averaged weights in half precision, ready for autoencoder.weights."""
        if self._ranks.is_main:
            path = folder / "autoencoder.safetensors"
            save_file({name: value.half() for name, value in weights.items()}, path)
            yield f"weights for autoencoder.weights: {path}"

    def _on_device(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or next(self.modules["autoencoder"].parameters()).dtype
        # DeepSpeed broadcasts contiguous weights only; convolutions follow their input's layout
        layout = (
            torch.channels_last if self._config.train.channels_last else torch.contiguous_format
        )
        return values.to(self._ranks.device, dtype, non_blocking=True, memory_format=layout)
