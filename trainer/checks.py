"""From a composed tree to a `Config` in which no two options contradict each other."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import CaptionForm
from models.checks import (
    conditioner_problems,
    diffusion_problems,
    first_stage_problems,
    sampler_problems,
)
from models.config import ConditionerKind
from trainer.averages import WIDEST
from trainer.config import Config, Features, Metric, Precision, Task

TEXT_KINDS = (ConditionerKind.text, ConditionerKind.transformers)


def to_config(tree: DictConfig, ranks: int = 1) -> Config:
    """Turn the tree into dataclasses; ranks: those that share the training's batch.

    Raises: ValueError that lists every missing value, or every contradiction, by config path.
    """
    if OmegaConf.is_missing(tree.run, "experiment"):
        raise ValueError("no experiment chosen: add +experiment=NAME, see conf/experiment/")
    unknown = sorted(set(_keys(tree)) - set(_paths(Config)))
    if unknown:
        raise ValueError("; ".join(_no_option(path) for path in unknown))
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    problems = list(_contradictions(config, ranks))
    if problems:
        raise ValueError("; ".join(problems))
    return config


def world_size() -> int:
    """Ranks of this job, as the launcher says (torchrun or srun); 1 without one.

    A process in a batch script or a shell of salloc is not one of the ranks that srun would start.
    """
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def grad_accum_steps(config: Config, ranks: int) -> int:
    """Micro batches a rank accumulates for one optimizer step; derived, never configured."""
    return config.train.global_batch_size // (config.train.micro_batch_size * ranks)


def explain(error: Exception) -> str:
    """One line for the person who typed the command; a misspelt key gets its nearest neighbour."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}: quote values with special characters"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    path = getattr(cause, "full_key", None)
    if path:
        if re.search(r"not in|no attribute", text):
            text = _no_option(str(path))
        elif path not in text:
            text = f"{path}: {text}"
    return text


def _no_option(path: str) -> str:
    near = difflib.get_close_matches(path, _paths(Config), n=1, cutoff=0.6)
    return f"{path} is no option" + "".join(f" (did you mean {name}?)" for name in near)


def _keys(tree: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in tree:
        yield f"{prefix}{key}"
        node = tree._get_node(key)
        if isinstance(node, DictConfig):
            yield from _keys(node, f"{prefix}{key}.")


def _paths(section: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(section).items():
        yield prefix + name
        if is_dataclass(kind):
            yield from _paths(kind, f"{prefix}{name}.")


def _contradictions(config: Config, ranks: int) -> Iterator[str]:
    yield from _batch_arithmetic(config, ranks)
    if config.deepspeed.stage not in (0, 1, 2, 3):
        yield f"deepspeed.stage={config.deepspeed.stage}: ZeRO has stages 0, 1, 2 and 3"
    if config.deepspeed.stage == 0 and config.train.precision is Precision.bf16:
        yield "deepspeed.stage=0 with train.precision=bf16 trains wrongly; use stage 1"
    yield from _averages(config)
    yield from _checkpoints(config)
    if config.deepspeed.stage == 0 and config.deepspeed.offload_optimizer:
        yield "deepspeed.offload_optimizer needs deepspeed.stage=1, 2 or 3"
    if config.deepspeed.stage == 3 and config.train.compile:
        yield "train.compile is not supported with deepspeed.stage=3; use stage 2"
    yield from _guards(config)
    if config.autoencoder.codebook_decay and config.train.precision is Precision.bf16:
        yield "autoencoder.codebook_decay: bf16 loses its small steps; use train.precision=fp32"
    if config.task is Task.autoencoder:
        yield from _first_stage(config)
    side, factor = config.data.image_size, config.autoencoder.downsample_factor
    if side % factor:
        yield f"data.image_size={side} is no multiple of the autoencoder's factor {factor}"
    yield from _data(config)
    yield from _evaluation(config)
    if config.task is Task.diffusion:
        yield from _diffusion(config)


def _batch_arithmetic(config: Config, ranks: int) -> Iterator[str]:
    total = config.train.global_batch_size
    micro, lanes = config.train.micro_batch_size, config.data.lanes
    if min(total, micro, lanes) < 1:
        yield "train.global_batch_size, train.micro_batch_size and data.lanes must be positive"
        return
    if total % (micro * ranks):
        yield (
            f"train.global_batch_size={total} does not divide into "
            f"train.micro_batch_size={micro} x {ranks} rank(s)"
        )
    if total % lanes:
        yield f"data.lanes={lanes} does not divide train.global_batch_size={total}"


def _averages(config: Config) -> Iterator[str]:
    ema = config.ema
    if not ema.decays and not ema.sigma_rels:
        yield "ema.decays and ema.sigma_rels are both empty: samples are drawn from an average"
    for path, values in (("ema.decays", ema.decays), ("ema.sigma_rels", ema.sigma_rels)):
        if len(set(values)) < len(values):
            yield f"{path}={values} names an average twice"
    if not all(0 <= decay < 1 for decay in ema.decays):
        yield f"ema.decays={ema.decays} must lie in [0, 1)"
    if not all(0 < width <= WIDEST for width in ema.sigma_rels):
        yield f"ema.sigma_rels={ema.sigma_rels} must lie in (0, {WIDEST}]"
    if not 0 < ema.reconstruct.sigma_rel <= WIDEST:
        yield f"ema.reconstruct.sigma_rel={ema.reconstruct.sigma_rel} must lie in (0, {WIDEST}]"
    if ema.snapshot_every < 0:
        yield f"ema.snapshot_every={ema.snapshot_every} must be at least 0"
    if ema.snapshot_every and len(ema.sigma_rels) < 2:
        yield f"ema.snapshot_every={ema.snapshot_every} needs two widths: ema.sigma_rels=[0.05,0.1]"


def _checkpoints(config: Config) -> Iterator[str]:
    options, evaluations = config.checkpoint, config.eval.every
    for path, value, lowest in (
        ("checkpoint.every", options.every, 1),
        ("checkpoint.keep", options.keep, 1),
        ("checkpoint.keep_every", options.keep_every, 0),
    ):
        if value < lowest:
            yield f"{path}={value} must be at least {lowest}"
    if options.keep_every and options.every > 0 and options.keep_every % options.every:
        yield (
            f"checkpoint.keep_every={options.keep_every} is no multiple of "
            f"checkpoint.every={options.every}: most of its checkpoints are never written"
        )
    if options.best and options.every > 0 and (not evaluations or evaluations % options.every):
        yield (
            f"checkpoint.best={options.best} needs eval.every, a multiple of "
            f"checkpoint.every={options.every}: what is evaluated must be saved"
        )


def _guards(config: Config) -> Iterator[str]:
    guards, watchdog = config.guards, config.watchdog
    if guards.spike_factor and guards.spike_factor <= 1:
        yield f"guards.spike_factor={guards.spike_factor} must be over 1, or 0 for never"
    least = {
        "guards.max_consecutive_skips": (guards.max_consecutive_skips, 0),
        "guards.spike_factor": (guards.spike_factor, 0),
        "guards.spike_window": (guards.spike_window, 1),
        "guards.max_rewinds": (guards.max_rewinds, 0),
        "watchdog.step_timeout_s": (watchdog.step_timeout_s, 0),
        "watchdog.pause_timeout_s": (watchdog.pause_timeout_s, 0),
    }
    for path, (value, lowest) in least.items():
        if not value >= lowest:
            yield f"{path}={value} must be at least {lowest}"


def _data(config: Config) -> Iterator[str]:
    source, job = config.data.source, config.precompute
    if not 0 <= source.val_share < 1:
        yield f"data.source.val_share={source.val_share} must lie in [0, 1)"
    least = {
        "data.source.workers": (source.workers, 1),
        "data.source.shard_samples": (source.shard_samples, 1),
        "data.shuffle_block": (config.data.shuffle_block, 1),
        "data.workers": (config.data.workers, 0),
        "data.prefetch": (config.data.prefetch, 1),
        "precompute.batch_size": (job.batch_size, 1),
        "precompute.workers": (job.workers, 0),
        "sample.images_per_prompt": (config.sample.images_per_prompt, 1),
        "sample.batch_size": (config.sample.batch_size, 1),
    }
    for path, (value, lowest) in least.items():
        if value < lowest:
            yield f"{path}={value} must be at least {lowest}"
    for number, rule in enumerate(config.data.filters):
        ranged = rule.min is not None or rule.max is not None
        path = f"data.filters[{number}] ({rule.name})"
        if ranged == bool(rule.allowed):
            yield f"{path} needs either min, max or both, or allowed"
        elif rule.min is not None and rule.max is not None and rule.min > rule.max:
            yield f"{path}: min={rule.min} is over max={rule.max}"
    if not 0 <= job.task < job.num_tasks:
        yield f"precompute.task={job.task} must lie in [0, precompute.num_tasks={job.num_tasks})"
    if config.task is Task.autoencoder and config.data.mixture:
        yield "data.mixture is of latents, but task=autoencoder trains on the images of data.train"


def _evaluation(config: Config) -> Iterator[str]:
    own, metrics = config.eval, config.eval.metrics
    least = {Metric.frechet: 2, Metric.kid: own.kid_subset_size, Metric.precision_recall: 4}
    least |= {Metric.inception_score: 10}
    for metric in metrics if own.features and not own.images else []:
        if own.num_samples < least.get(metric, 1):
            yield f"eval.num_samples={own.num_samples}: {metric} needs {least[metric]} or more"
    for metric, needed in (
        (Metric.inception_score, Features.inception),
        (Metric.cmmd, Features.open_clip),
    ):
        if metric in metrics and needed not in own.features:
            yield f"eval.metrics: {metric} needs eval.features to have {needed}"
    has_clip = own.clip_model or config.conditioner.kind is ConditionerKind.text
    if Features.open_clip in own.features and not has_clip:
        yield "eval.features: open_clip needs eval.clip_model and eval.clip_pretrained"
    if bool(own.clip_model) != bool(own.clip_pretrained):
        yield "eval.clip_model and eval.clip_pretrained go together: set both or neither"
    if own.batch_size < 1 or own.reference_samples < 0 or own.kid_subset_size < 2:
        yield "eval.batch_size, eval.reference_samples or eval.kid_subset_size is too small"


def _first_stage(config: Config) -> Iterator[str]:
    if config.deepspeed.stage == 3 and config.autoencoder.loss.gan_weight:
        yield (
            "deepspeed.stage=3 spreads the discriminator's weights, through which the first "
            "stage's loss runs; use deepspeed.stage=2, or autoencoder.loss.gan_weight=0"
        )
    yield from first_stage_problems(config.autoencoder, config.data.image_size)


def _diffusion(config: Config) -> Iterator[str]:
    unet, stage = config.unet, config.autoencoder
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != stage.latent_channels:
            yield (
                f"unet.{name}={getattr(unet, name)} but "
                f"autoencoder.latent_channels={stage.latent_channels}"
            )
    levels = len(unet.block_out_channels)
    for name in ("attention", "heads"):
        if len(getattr(unet, name)) != levels:
            yield f"unet.{name} needs {levels} entries, one for each of unet.block_out_channels"
    latent_side = config.data.image_size // stage.downsample_factor
    if latent_side % 2 ** (levels - 1):
        yield (
            f"unet.block_out_channels has {levels} levels, but latents of side {latent_side} "
            f"cannot be halved {levels - 1} times"
        )
    kind = config.conditioner.kind
    width = 0 if kind is ConditionerKind.none else config.conditioner.width
    if unet.context_dim != width:
        yield f"unet.context_dim={unet.context_dim} but the conditioner's tokens are {width} wide"
    yield from conditioner_problems(config.conditioner)
    if kind is not ConditionerKind.text and config.eval.clip_score:
        yield "eval.clip_score needs conditioner.kind=text"
    if config.data.store_text and kind not in TEXT_KINDS:
        yield "data.store_text needs conditioner.kind=text or transformers"
    if config.data.store_text and config.data.captions is not CaptionForm.text:
        yield (
            f"data.store_text keeps the tokens of one caption, but data.captions="
            f"{config.data.captions} draws one of several: set data.store_text=false"
        )
    yield from diffusion_problems(config.diffusion)
    yield from sampler_problems(config.sampler, config.diffusion)
    if not 0 < config.sample.strength <= 1:
        yield f"sample.strength={config.sample.strength} must lie in (0, 1]"
    if config.sample.negative_prompt and config.sampler.guidance_scale == 1:
        yield "sample.negative_prompt does nothing at sampler.guidance_scale=1: raise that"
