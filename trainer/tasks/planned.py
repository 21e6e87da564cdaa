"""The tasks without data and frozen networks, for a plan: their losses are the real ones."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from data.stream import Batch
from models.attention import Context
from models.autoencoder import build_autoencoder
from models.clip import text_tower
from models.conditioners import Captions, Conditioner, build_conditioner
from models.config import ConditionerConfig, ConditionerKind, TextFeatures
from models.diffusion import Diffusion
from models.first_stage_loss import LikelihoodFirstStage, ReconstructionError
from models.unet import UNet2DCondition
from trainer.config import Config, Task
from trainer.distributed import Ranks
from trainer.pipeline import LatentDiffusion, LatentScale
from trainer.tasks.autoencoder import FIRST_STAGE, AutoencoderTask
from trainer.tasks.diffusion import DiffusionTask

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Frozen:
    """Networks beside the trained one."""

    parameters: int
    """Of the first stage and CLIP's text tower; fp32."""
    context_tokens: int
    """Tokens that the text encoder gives; 0 without one."""
    flops_per_image: int
    """Of the text encoder, where it runs while training."""


class PlannedDiffusion(DiffusionTask):
    """Denoising with latents, and contexts of frozen encoders, that have shapes only."""

    def __init__(self, config: Config, module: LatentDiffusion, context_tokens: int) -> None:
        self._config = config
        self._ranks = ALONE
        self._scale = LatentScale([0.0], [1.0])
        self._conditioner = module.conditioner or Shape(config.conditioner, context_tokens)
        self._diffusion = Diffusion(config.diffusion)
        self.modules = {"denoiser": module}

    def planned_loss(self, micro_batch: int) -> Tensor:
        """Of a batch of this size."""
        stage = self._config.autoencoder
        side = self._config.data.image_size // stage.downsample_factor
        moments = torch.empty(micro_batch, 2, stage.latent_channels, side, side).half()
        return self.loss(self.modules["denoiser"], _batch(moments=moments)).mean


class PlannedAutoencoder(AutoencoderTask):
    """A first stage on images that have shapes only, without perceptual network and adversary."""

    def __init__(self, config: Config, module: nn.Module) -> None:
        self._config = config
        self._ranks = ALONE
        self._adversary = None
        self._error = ReconstructionError(replace(config.autoencoder.loss, perceptual_weight=0.0))
        self._penalty = self._weighted_penalty()
        self.modules = {FIRST_STAGE: module}

    def planned_loss(self, micro_batch: int) -> Tensor:
        """Of a batch of this size."""
        side = self._config.data.image_size
        images = torch.empty(micro_batch, self._config.autoencoder.in_channels, side, side)
        (loss,) = self.losses(FIRST_STAGE, self.modules[FIRST_STAGE], [_batch(images=images)], 0)
        return loss.mean


class Shape(Conditioner):
    """Stands for a frozen conditioner: contexts of its shape."""

    trainable = False

    def __init__(self, config: ConditionerConfig, tokens: int) -> None:
        """tokens: of a context; 0 for none."""
        super().__init__()
        self.tokens = tokens
        self.context_dim = config.width if tokens else 0
        pooled = config.features is TextFeatures.pooled
        self.masked = config.kind is ConditionerKind.transformers and not pooled

    def forward(self, captions: Captions) -> Context | None:
        """See the base class."""
        if not self.tokens:
            return None
        shape = len(captions), self.tokens
        mask = torch.ones(shape, dtype=torch.bool) if self.masked else None
        return Context(torch.empty(*shape, self.context_dim), mask)


def build_module(config: Config) -> nn.Module:
    """What the config trains, with untrained weights."""
    if config.task is Task.autoencoder:
        learns = config.autoencoder.loss.learn_log_variance
        return LikelihoodFirstStage(
            build_autoencoder(config.autoencoder), learn_log_variance=learns
        )
    labels = config.conditioner.kind is ConditionerKind.class_label
    conditioner = build_conditioner(config.conditioner) if labels else None
    return LatentDiffusion(UNet2DCondition(config.unet), conditioner)


def planned(
    config: Config, module: nn.Module, frozen: Frozen
) -> PlannedDiffusion | PlannedAutoencoder:
    """The task that trains this module."""
    if isinstance(module, LatentDiffusion):
        return PlannedDiffusion(config, module, frozen.context_tokens)
    return PlannedAutoencoder(config, module)


def frozen_networks(config: Config) -> Frozen:
    """What stands beside the trained network; nothing is loaded.

    The weights of an encoder of the transformers library are known to its files alone: they do not
    count.
    """
    if config.task is Task.autoencoder:
        return Frozen(0, 0, 0)
    conditioner = config.conditioner
    with torch.device("meta"):
        parameters = _count(build_autoencoder(config.autoencoder))
    pooled = conditioner.features is TextFeatures.pooled
    if conditioner.kind is ConditionerKind.transformers:
        return Frozen(parameters, 1 if pooled else conditioner.context_length, 0)
    if conditioner.kind is not ConditionerKind.text:
        return Frozen(parameters, 0, 0)
    tower = text_tower(conditioner.model)
    flops = 0 if config.data.store_text else tower.flops
    return Frozen(parameters + tower.parameters, 1 if pooled else tower.tokens, flops)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _batch(**arrays: Tensor) -> Batch:
    (size,) = {len(array) for array in arrays.values()}
    return Batch(
        epoch=np.zeros(size, np.int64),
        index=np.arange(size, dtype=np.int64),
        keys=[""] * size,
        captions=["0"] * size,  # a caption that is a class number, too
        arrays=arrays,
    )
