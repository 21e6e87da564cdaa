"""The task of a denoiser, which trains on the latents of a frozen first stage."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from data.streams.latents import LatentStream
from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.conditioning.text import Text, same_weights, text_fingerprint
from models.config import LatentScaling
from models.config.conditioning import CONDITIONERS
from models.first_stage import autoencoder
from models.first_stage.autoencoder import load_autoencoder
from models.first_stage.first_stage import FirstStage
from models.latent_diffusion import LatentDiffusion, LatentScale, encode_normalised
from models.layers.attention import AttentionChoice, choose_attention
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition, attention_shapes
from models.weights.compvis import load_unet
from trainer.config import Config, Precision
from trainer.engine.compilation import compile_blocks
from trainer.metrics.evaluator import Evaluator, build_evaluator
from trainer.metrics.result import Evaluation
from trainer.pipeline import FIRST_STAGE, TEXT_ENCODER, Pipeline, cast_networks
from trainer.runs.paths import CHECKPOINTS, SAMPLES
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.progress import Stopping
from trainer.runtime.ranks import Ranks
from trainer.streams import CONDITION_ARRAYS, open_latents
from trainer.train.denoising_loss import DenoisingLoss
from trainer.train.latent_scale import choose_scale
from trainer.train.task import Trained, TrainingTask, Turn, Weights

DENOISER = "denoiser"


class DenoisingTask(TrainingTask):
    """Denoising score matching in latent space (Rombach et al. 2022, equations 2 and 3)."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        stream: LatentStream,
        module: LatentDiffusion,
        scale: LatentScale,
        frozen: tuple[FirstStage, Conditioner],
        evaluator: Evaluator | None,
        kernels: Mapping[str, str],
    ) -> None:
        """frozen: first stage and conditioner; a trained conditioner is also part of `module`.

        kernels: of attention, by what they compute.
        """
        self._config = config
        self._ranks = ranks
        self.stream = stream
        self._autoencoder, self._conditioner = frozen
        self._evaluator = evaluator
        info = stream.manifest.latents
        assert info is not None
        text = frozen[1] if isinstance(frozen[1], Text) else None
        self._networks = {FIRST_STAGE: info.encoder}
        if text is not None:
            stored = info.text_encoder if config.data.store_text else ""
            self._networks[TEXT_ENCODER] = stored or text_fingerprint(text)
        stream.consumed = CONDITION_ARRAYS
        stream.pinned = ranks.device.type == "cuda"
        self._use(scale)
        self.trained = {DENOISER: Trained(module, averaged=True)}
        self.kernels = kernels

    def _use(self, scale: LatentScale) -> None:
        self._scale = scale
        encode = partial(encode_normalised, self._autoencoder, scale)
        device = self._ranks.device
        loss = DenoisingLoss(self._config, scale, self._conditioner, encode, device)
        self.stream.draw, self._turn = loss.draw, Turn(DENOISER, loss)

    def _keep(self, factor: LatentScale) -> None:
        self._use(factor)
        number = 1 / factor.values["std"][0]
        self._ranks.say(f"latents are multiplied by {number:.6g}, as in the checkpoint")

    def turns(self, step: int) -> Sequence[Turn]:
        """Return the one turn of every step."""
        return [self._turn]

    def evaluate(
        self, weights: Weights, stopping: Stopping, *, baselines: bool
    ) -> Evaluation | None:
        """Draw samples with averaged weights, and measure them."""
        assert self._evaluator is not None
        with torch.device("meta"):
            trained = self._conditioner.trainable
            conditioner = build_conditioner(self._config.conditioner) if trained else None
            module = LatentDiffusion(UNet2DCondition(self._config.unet), conditioner)
        module.load_state_dict(weights, assign=True)
        autoencoder, device = self._autoencoder, self._ranks.device
        cast_networks(self._config, device, module)
        conditioner = conditioner or self._conditioner
        pipeline = Pipeline(self._config, module, conditioner, autoencoder, self._scale, device)
        with on_device([module, conditioner, autoencoder], device):
            return self._evaluator.evaluate(pipeline, stopping, baselines=baselines)

    def state(self) -> dict[str, Any]:
        """Return the scale of the latents, which sampling needs, and hashes of frozen networks.

        The kernels are for the record: a run may go on with others.
        """
        kernels = dict(self.kernels)
        return {"latent_scale": self._scale.values, **self._networks, "kernels": kernels}

    def load(self, state: dict[str, Any]) -> None:
        """Check that the latents have the scale of the checkpoint, and the networks its hashes.

        A text encoder may go on in another precision, on another kind of device. One factor for all
        channels is taken from the checkpoint: it does not come from these latents, or not exactly.

        Raises: ValueError naming the option of the latents or of a network.
        """
        options = {FIRST_STAGE: "autoencoder.weights", TEXT_ENCODER: "conditioner.pretrained"}
        for name, digest in self._networks.items():
            if not same_weights(state.get(name, digest), digest):  # 0.1.0 did not save hashes
                raise ValueError(
                    f"{options[name]}: the weights of this run had the hash {state[name][:12]}, "
                    f"these have {digest[:12]}: name those, or choose another run.name"
                )
        saved = LatentScale(**state["latent_scale"])
        if saved.values == self._scale.values:
            return
        if not saved.is_factor:
            raise ValueError(
                f"{self.stream.option}: the mean or std of these latents differs from that of the "
                "latents this run began with: name those, or choose another run.name"
            )
        self._keep(saved)

    @override
    def begin_with(self, state: dict[str, Any]) -> None:
        """With diffusion.latent_scale=auto, take the factor of the weights, if they have one."""
        saved = LatentScale(**state["latent_scale"])
        if saved.is_factor and self._config.diffusion.latent_scale is LatentScaling.auto:
            self._keep(saved)

    def finish(self, averaged: Callable[[], Weights], folder: Path) -> str:
        """Return the place of the checkpoints, which hold the averaged weights."""
        drawn = f"; samples: {folder / SAMPLES}" if self._config.eval.every else ""
        return f"trained: {folder / CHECKPOINTS}{drawn}"


def build_denoising(config: Config, ranks: Ranks) -> DenoisingTask:
    """Open the latents and build the task with its initial weights.

    Raises: ValueError naming the config path if other networks made the latents; ValueError or
    OSError for data or weights that cannot be loaded.
    """
    stream = open_latents(config, ranks)
    first_stage = load_autoencoder(config.autoencoder)
    rng.seed_torch(config.run.seed)
    conditioner = build_conditioner(config.conditioner)
    _check_latents(config, stream, first_stage, conditioner)
    cast_networks(config, ranks.device, first_stage, conditioner)
    if conditioner.images:
        first_stage.to(ranks.device)
    if not (isinstance(conditioner, Text) and config.data.store_text):
        conditioner.to(ranks.device)  # beside stored text, training needs the empty caption alone
    unet = UNet2DCondition(config.unet)
    told = None
    if config.unet.weights:
        told = load_unet(unet, config.unet, Path(config.unet.weights))
        if conditioner.trainable:
            ranks.say("the file of the U-Net has no conditioner: that begins untrained")
    module = LatentDiffusion(unet, conditioner if conditioner.trainable else None).to(ranks.device)
    attention = _choose_attention(config, conditioner, ranks.device)
    use_attention(module, attention.backend)
    ranks.say(attention.line)
    if config.train.compile:
        compile_blocks(module)
    evaluator = build_evaluator(config, ranks) if config.eval.every else None
    scale = choose_scale(config, ranks, stream, told)
    frozen = first_stage, conditioner
    kernels = {f"attention of {name}": kernel for name, kernel in attention.kernels.items()}
    return DenoisingTask(config, ranks, stream, module, scale, frozen, evaluator, kernels)


def _choose_attention(
    config: Config, conditioner: Conditioner, device: torch.device
) -> AttentionChoice:
    side = config.data.image_size // config.autoencoder.downsample_factor
    empty = Given([None])
    has_tokens = CONDITIONERS[config.conditioner.kind].has_tokens
    tokens, mask, _ = conditioner.condition(empty, (side, side)) if has_tokens else Condition()
    shapes = attention_shapes(
        config.unet,
        config.train.micro_batch_size,
        side,
        0 if tokens is None else tokens.shape[1],
        masked=mask is not None,
    )
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
    return choose_attention(config.unet.attention_backend, device, dtype, shapes)


def _check_latents(
    config: Config, stream: LatentStream, first_stage: FirstStage, conditioner: Conditioner
) -> None:
    info = stream.manifest.latents
    assert info is not None
    text = conditioner if config.data.store_text else None
    if info.encoder != autoencoder.fingerprint(first_stage):
        option = "autoencoder.weights"
    elif isinstance(text, Text) and info.text_encoder != text_fingerprint(text):
        option = "conditioner.pretrained"
    else:
        return
    raise ValueError(
        f"{stream.option}: these latents were made by another network than {option}; set that "
        "option to theirs, or name other latents; those of this experiment are made by "
        f"python -m trainer.precompute +experiment={config.run.experiment}"
    )
