"""The plan of a denoising step for `trainer.plan`, without data, weights and frozen networks."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.condition import Condition
from models.conditioning.conditioner import Captions, Conditioner, Outline, Size, TokenIds
from models.conditioning.conditioners import build_conditioner, conditioner_class
from models.config import ConditionerConfig
from models.config.conditioning import CONDITIONERS
from models.first_stage.autoencoder import build_stage
from models.latent_diffusion import LatentDiffusion, LatentScale
from models.unet import UNet2DCondition
from trainer.config import Config
from trainer.runtime.devices import inference_dtype
from trainer.train.denoising_loss import DenoisingLoss
from trainer.train.task import Frozen, StepPlan, shapes_only

NUMBER_BYTES = 2
"""Size of a stored fp16 number."""
MEMBER_BYTES = 3584
"""Size of a latent sample in a tar without its tensors: headers, caption, JSON, padding."""
TAR_HEADER_BYTES = 512 + 128
"""Size of the headers of a tensor in a tar: that of tar and that of numpy."""


def plan_denoising(config: Config) -> StepPlan:
    """Plan a denoising step on latents and conditions that have shapes and no values."""
    stage = config.autoencoder
    side = config.data.image_size // stage.downsample_factor
    conditioner = StandIn(config.conditioner)
    # the captions have no meaning here: use the null condition, which every conditioner has
    all_null = replace(config.conditioner, cond_drop_prob=1.0)
    step_loss = DenoisingLoss(
        replace(config, conditioner=all_null),
        LatentScale([0.0], [1.0]),
        conditioner,
        torch.device("cpu"),
    )

    def build_module() -> LatentDiffusion:
        trained = build_conditioner(config.conditioner) if conditioner.trainable else None
        return LatentDiffusion(UNet2DCondition(config.unet), trained)

    def loss(module: nn.Module, micro_batch: int) -> Tensor:
        posteriors = torch.empty(micro_batch, 2, stage.latent_channels, side, side).half()
        batch = shapes_only(moments=posteriors)
        batch.drawn = step_loss.draw(batch)
        return step_loss(module, batch).mean

    outline = conditioner.shape
    latent = 2 * stage.latent_channels * side**2 * NUMBER_BYTES + TAR_HEADER_BYTES
    sample_bytes = (1 + config.data.flip) * latent + MEMBER_BYTES
    if config.data.store_text:
        sample_bytes += outline.tokens * conditioner.context_dim * NUMBER_BYTES + TAR_HEADER_BYTES
    return StepPlan(
        build_module=build_module,
        loss=loss,
        frozen=_frozen(config, outline),
        sample_bytes=sample_bytes,
        checkpointing=True,
        not_counted=[outline.not_counted] if outline.not_counted else [],
    )


class StandIn(Conditioner):
    """A conditioner without weights, whose conditions have shapes and no values."""

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        kind = conditioner_class(config)
        self.shape = kind.outline(config)
        self.trainable = kind.trainable
        self.context_dim = config.width if self.shape.tokens else 0
        self._planes = CONDITIONERS[config.kind].planes(config)

    @override
    def forward(self, captions: Captions | TokenIds, size: Size) -> Condition:
        batch, outline = len(captions), self.shape
        tokens = mask = planes = None
        if outline.tokens:
            tokens = torch.empty(batch, outline.tokens, self.context_dim)
        if outline.masked:
            mask = torch.ones(batch, outline.tokens, dtype=torch.bool)
        if self._planes:
            planes = torch.empty(batch, self._planes, *size)
        return Condition(tokens, mask, planes)


def _frozen(config: Config, conditioner: Outline) -> Frozen:
    """Count the frozen networks of a training on GPUs, without loading weights."""
    with torch.device("meta"):
        first_stage = build_stage(config.autoencoder)
    parameters = sum(parameter.numel() for parameter in first_stage.parameters())
    total = parameters + conditioner.parameters
    if config.data.store_text:
        return Frozen(total)
    width = inference_dtype(torch.device("cuda"), config.train.precision).itemsize
    return Frozen(total, conditioner.parameters * width, conditioner.flops)
