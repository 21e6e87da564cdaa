"""The plan of a denoising step for `trainer.plan`, without data, weights and frozen networks."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from data.streams.rows import MAP_ARRAY
from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Outline, Size
from models.conditioning.conditioners import build_conditioner, conditioner_class
from models.conditioning.given import Given
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
    conditioner = _conditioner(config.conditioner, stage.latent_channels)
    # the captions have no meaning here: use the null condition, which every conditioner has
    all_null = replace(config.conditioner, cond_drop_prob=1.0)
    step_loss = DenoisingLoss(
        replace(config, conditioner=all_null),
        LatentScale([0.0], [1.0]),
        conditioner,
        nn.Identity(),  # a stand-in has no images to encode
        torch.device("cpu"),
    )

    def build_module() -> LatentDiffusion:
        trained = build_conditioner(config.conditioner) if conditioner.trainable else None
        return LatentDiffusion(UNet2DCondition(config.unet), trained)

    def loss(module: nn.Module, micro_batch: int) -> Tensor:
        posteriors = torch.empty(micro_batch, 2, stage.latent_channels, side, side).half()
        arrays = {"moments": posteriors}
        if config.data.maps:
            pixels = config.data.image_size
            arrays[MAP_ARRAY] = torch.zeros(micro_batch, pixels, pixels, dtype=torch.uint8)
        batch = shapes_only(**arrays)
        batch.drawn = step_loss.draw(batch)
        return step_loss(module, batch).mean

    outline = conditioner_class(config.conditioner).outline(config.conditioner)
    latent = 2 * stage.latent_channels * side**2 * NUMBER_BYTES + TAR_HEADER_BYTES
    sample_bytes = (1 + config.data.flip) * latent + MEMBER_BYTES
    if config.data.store_text:
        sample_bytes += outline.tokens * conditioner.context_dim * NUMBER_BYTES + TAR_HEADER_BYTES
    pixels = config.data.image_size**2  # the size of a PNG that cannot be compressed
    sample_bytes += 3 * pixels * config.data.store_images + pixels * config.data.maps
    return StepPlan(
        build_module=build_module,
        loss=loss,
        frozen=_frozen(config, outline),
        sample_bytes=sample_bytes,
        checkpointing=True,
        not_counted=[outline.not_counted] if outline.not_counted else [],
    )


def _conditioner(config: ConditionerConfig, channels: int) -> Conditioner:
    """Build a conditioner without weights; one that is trained prepares its true inputs.

    channels: of the latents.
    """
    if not conditioner_class(config).trainable:
        return StandIn(config, channels)
    with torch.device("meta"):
        return build_conditioner(config)


class StandIn(Conditioner):
    """A frozen conditioner without weights, whose conditions have shapes and no values."""

    trainable = False

    def __init__(self, config: ConditionerConfig, channels: int) -> None:
        super().__init__()
        self.shape = conditioner_class(config).outline(config)
        self.context_dim = config.width if self.shape.tokens else 0
        self._planes = CONDITIONERS[config.kind].planes(config, channels)

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        return {"rows": torch.empty(len(given.captions))}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        batch, outline = len(inputs["rows"]), self.shape
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
    running, flops = conditioner.parameters, conditioner.flops
    if conditioner_class(config.conditioner).images:
        side = config.data.image_size
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            first_stage.encode(torch.empty(1, config.autoencoder.in_channels, side, side))
        running, flops = running + parameters, flops + counter.get_total_flops()
    width = inference_dtype(torch.device("cuda"), config.train.precision).itemsize
    return Frozen(total, running * width, flops)
