"""Checks of a config: types, ranges, and options that contradict each other."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import CropPlace
from data.order import batches
from data.order.batches import batch_problems
from data.secrets import redact
from data.text import escaped
from models.checks import (
    conditioner_problems,
    diffusion_problems,
    first_stage_problems,
    identity_problems,
    sampler_problems,
)
from models.config import AutoencoderKind
from models.config.conditioning import CONDITIONERS, ConditionerEntry
from models.config.domains import outside
from models.config.targets import resolve
from trainer.config import Config, Precision
from trainer.config.gpus import gpu_table
from trainer.config.metrics import FEATURES, METRICS
from trainer.config.outside import text_problems, watch_environment
from trainer.config.tasks import TASKS
from trainer.options import all_sections, did_you_mean, groups, paths

MAX_LR = 1000
"""Largest learning rate, as in the domain of optim.lr."""


def to_config(tree: DictConfig, ranks: int = 1) -> Config:
    """Turn the tree into dataclasses, and check them.

    ranks: the number of ranks that share train.global_batch_size.
    Raises: ValueError that lists every unknown option, every missing value, or every contradiction,
    by config path.
    """
    watch_environment()
    if OmegaConf.get_type(tree) is not Config:
        raise ValueError("this config lacks its schema: begin its defaults with `- config`")
    plain: object = OmegaConf.to_container(tree, resolve=False)
    assert _is_tree(plain)
    unknown = sorted(set(_keys(plain)) - set(paths()))
    if unknown:
        raise ValueError("; ".join(_no_option(path) for path in unknown))
    if OmegaConf.is_missing(tree.run, "experiment"):
        names = ", ".join(groups()["experiment"])
        raise ValueError(f"no experiment chosen: add +experiment=NAME, one of {names}")
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    problems = list(contradictions(config, ranks))
    if problems:
        raise ValueError("; ".join(problems))
    return config


def grad_accum_steps(config: Config, ranks: int) -> int:
    """Return the number of micro batches of a rank in an optimizer step; it is no option."""
    train = config.train
    return batches.grad_accum_steps(
        train.global_batch_size, ranks=ranks, micro_batch=train.micro_batch_size
    )


def explain(error: Exception) -> str:
    """Return the error in one line, without secrets and control characters.

    A misspelt name comes with the most similar one.
    """
    return escaped(redact(_explain(error)))


def _explain(error: Exception) -> str:
    # Hydra wraps OmegaConf's errors; under a debugger, these have causes without a path
    inner = error.__cause__ if isinstance(error, HydraException) else None
    cause = inner if isinstance(inner, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        path = (error.override or "").partition("=")[0]  # the value may be a secret
        return f"cannot read the override of {path!r}: quote values with special characters"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text, path = lines[0] if lines else type(error).__name__, _path(cause)
    if isinstance(error, HydraException) and not path:
        return _explain_choice(lines) or text
    if path and re.search(r"not in|no attribute", text):
        return _no_option(path)
    if path and "is not a subclass of" in text:
        own = next(one for one in paths() if one.startswith(f"{path}."))
        return f"{path} is a section and takes no value: set one of its options, such as {own}"
    if found := re.fullmatch(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        return _none_of(path, found[1], found[2].split(", "))
    if "does not support deletion" in text:
        return f"{path} cannot be deleted: give it a value{_requirement(path)}"
    if "not Optional" in text:
        text = "null is no value"
    elif not path or path in text:
        return text
    return f"{path}: {text.rstrip('.')}{_requirement(path)}"


def _explain_choice(lines: Sequence[str]) -> str:
    """Explain Hydra's lines about an override or a file of conf/; empty for other lines."""
    text = "\n".join(lines)
    if found := re.match(r"Ambiguous value for argument '\+*([^=]*)", text):
        return f"{found[1]} has several values: use -m to sweep, [] for a list, '' for one text"
    if found := re.match(r"Multiple values for (.*)\. To override .* 'override .*: (.*)'", text):
        name, choice = found.groups()
        return (
            f"{name} is chosen already: write {name}={choice} on the command line, "
            f"`override /{name}: {choice}` in a file"
        )
    if re.search(r"Could not load '.*'", text):
        return f"{lines[0]} --config-path leaves out conf/; --config-dir adds a folder to it"
    if found := re.search(r"No match in the defaults list\.\n.* use (\+.*)", text):
        return f"{found[1][1:]}: nothing is chosen yet, so write {found[1]}"
    if found := re.search(r"Could not delete .* '(.*)' does|config group '(.*)' does not", text):
        return _no_option(found[1] or found[2])
    if found := re.search(r"Could not find '(.*)/(.*)'\n", text):
        listed = re.search(r"Available options in .*:\n((?s:.*?))\n?Config search path:", text)
        return _none_of(found[1], found[2], listed[1].splitlines() if listed else ())
    return ""


def _none_of(path: str, value: str, choices: Sequence[str]) -> str:
    return f"{path}={value} is none of {', '.join(choices)}{did_you_mean(value, choices)}"


def _no_option(path: str) -> str:
    of_items = [one.path for section in all_sections() for one in section.options]
    return f"{path} is no option{did_you_mean(path, [*paths(), *groups(), *of_items])}"


def _path(cause: Exception) -> str:
    """Return the config path of an error; empty if it has none.

    OmegaConf converts the items of a list by themselves: their paths lack that of the list.
    """
    path = str(getattr(cause, "full_key", None) or "")
    owner = getattr(cause, "object_type", None)
    places = [section.path for section in all_sections() if section.path and section.kind is owner]
    for place in places if path and "." not in path else []:
        return f"{place}.{path}"
    return path


def _requirement(path: str) -> str:
    """Return the domain of an option, or of a list that the path names an item of, as words."""
    stem = re.sub(r"\[\d+\]", "[]", path)
    domains = {one.path: one.domain for section in all_sections() for one in section.options}
    domain = domains.get(stem) or domains.get(stem.removesuffix("[]"))
    return f"; it must be {domain}" if domain else ""


def _keys(tree: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if _is_tree(value):
            yield from _keys(value, f"{prefix}{key}.")


def _is_tree(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def contradictions(config: Config, ranks: int) -> Iterator[str]:
    """Yield a line for each contradiction: config paths, cause and fix.

    ranks: the number of ranks that share train.global_batch_size.
    """
    train, lanes = config.train, config.data.lanes
    wrong = [*text_problems(config), *outside(config)]
    if wrong:  # the other checks calculate with the numbers
        yield from wrong
        return
    yield from batch_problems(
        train.global_batch_size, ranks=ranks, micro_batch=train.micro_batch_size, lanes=lanes
    )
    yield from _zero(config)
    yield from _averages(config)
    yield from _checkpoints(config)
    yield from _data(config)
    yield from _evaluation(config)
    if config.optim.peak_lr(train.global_batch_size) > MAX_LR:
        yield (
            f"optim.scale_lr multiplies optim.lr={config.optim.lr} by "
            f"train.global_batch_size={train.global_batch_size}: more than {MAX_LR}"
        )
    if config.plan.gpu not in gpu_table()["cards"]:
        yield _none_of("plan.gpu", config.plan.gpu, list(gpu_table()["cards"]))
    yield from resolve(TASKS[config.task].problems)(config)


def _zero(config: Config) -> Iterator[str]:
    stage, precision = config.deepspeed.stage, config.train.precision
    if stage == 0 and precision is Precision.bf16:
        yield "deepspeed.stage=0 with train.precision=bf16 trains wrongly; use stage 1"
    if stage == 0 and config.deepspeed.offload_optimizer:
        yield "deepspeed.offload_optimizer needs deepspeed.stage=1, 2 or 3"
    if stage == 3 and config.train.compile:
        yield "train.compile is not supported with deepspeed.stage=3; use stage 2"
    if config.autoencoder.codebook_decay and precision is Precision.bf16:
        yield "autoencoder.codebook_decay: bf16 loses its small steps; use train.precision=fp32"


def _averages(config: Config) -> Iterator[str]:
    ema = config.ema
    if not ema.decays and not ema.sigma_rels:
        yield "ema.decays and ema.sigma_rels are both empty: samples are drawn from an average"
    for path, values in (("ema.decays", ema.decays), ("ema.sigma_rels", ema.sigma_rels)):
        if len({f"{value:g}" for value in values}) < len(values):  # the form in names
            yield f"{path}={values} names an average twice"
    if ema.snapshot_every and len(ema.sigma_rels) < 2:
        yield f"ema.snapshot_every={ema.snapshot_every} needs two widths: ema.sigma_rels=[0.05,0.1]"


def _checkpoints(config: Config) -> Iterator[str]:
    options, evaluations = config.checkpoint, config.eval.every
    for name in ("load_raw", "load_optimizer"):
        if getattr(options, name) and not options.load:
            yield f"checkpoint.{name} needs checkpoint.load, the run or checkpoint to begin with"
    if options.load_optimizer and config.unet.widen_input:
        yield "checkpoint.load_optimizer has no moments for unet.widen_input: set one to false"
    if options.keep_every and options.keep_every % options.every:
        yield (
            f"checkpoint.keep_every={options.keep_every} is no multiple of "
            f"checkpoint.every={options.every}: most of its checkpoints are never written"
        )
    if options.best and (not evaluations or evaluations % options.every):
        yield (
            f"checkpoint.best={options.best} needs eval.every, a multiple of "
            f"checkpoint.every={options.every}: only saved steps can be kept"
        )


def _data(config: Config) -> Iterator[str]:
    job = config.precompute
    side, factor = config.data.image_size, config.autoencoder.downsample_factor
    if side % factor:
        yield f"data.image_size={side} is no multiple of the autoencoder's factor {factor}"
    sides = config.data.crop_sides
    if sides != sorted(sides):
        yield f"data.crop_sides={sides} must be [smallest, largest]"
    if sides != [1.0, 1.0] and config.data.crop is CropPlace.centre:
        yield f"data.crop_sides={sides} is of random crops: set data.crop=random, or leave it out"
    for number, rule in enumerate(config.data.filters):
        ranged = rule.min is not None or rule.max is not None
        path = f"data.filters[{number}] ({rule.name})"
        if ranged == bool(rule.allowed):
            yield f"{path} needs either min, max or both, or allowed"
        elif rule.min is not None and rule.max is not None and rule.min > rule.max:
            yield f"{path}: min={rule.min} is over max={rule.max}"
    try:
        bytes(4).decode(config.data.encoding)
    except (LookupError, ValueError):
        yield (
            f"data.encoding={config.data.encoding!r} is no encoding of text; take one such as "
            "utf-8, cp1252, shift_jis or gb18030"
        )
    if job.task >= job.num_tasks:
        yield f"precompute.task={job.task} must be below precompute.num_tasks={job.num_tasks}"


def _evaluation(config: Config) -> Iterator[str]:
    own = config.eval
    for metric in own.metrics:
        entry = METRICS[metric]
        least = getattr(own, entry.least_option) if entry.least_option else entry.least_samples
        if own.features and not own.images and own.num_samples < least:
            yield f"eval.num_samples={own.num_samples}: {metric} needs {least} or more"
        if entry.features is not None and entry.features not in own.features:
            yield f"eval.metrics: {metric} needs eval.features to have {entry.features}"
    has_clip = own.clip_model or CONDITIONERS[config.conditioner.kind].is_clip
    for name in own.features:
        if FEATURES[name].is_clip and not has_clip:
            yield f"eval.features: {name} needs eval.clip_model and eval.clip_pretrained"
    if bool(own.clip_model) != bool(own.clip_pretrained):
        yield "eval.clip_model and eval.clip_pretrained go together: set both or neither"


def reconstruction_problems(config: Config) -> Iterator[str]:
    """Yield the contradictions of task=autoencoder."""
    if config.autoencoder.kind is AutoencoderKind.identity:
        yield "autoencoder.kind=identity has nothing to train: choose kl or vq, or task=diffusion"
    if config.data.mixture:
        yield "data.mixture is of latents, but task=autoencoder trains on the images of data.train"
    if config.deepspeed.stage == 3 and config.autoencoder.loss.gan_weight:
        yield (
            "deepspeed.stage=3 spreads the discriminator's weights, through which the first "
            "stage's loss runs; use deepspeed.stage=2, or autoencoder.loss.gan_weight=0"
        )
    yield from first_stage_problems(config.autoencoder, config.data.image_size)


def denoising_problems(config: Config) -> Iterator[str]:
    """Yield the contradictions of task=diffusion."""
    unet, stage = config.unet, config.autoencoder
    yield from identity_problems(stage)
    if config.data.crop is CropPlace.random:
        yield "data.crop=random: stored latents have the centre crop; it is for task=autoencoder"
    entry = CONDITIONERS[config.conditioner.kind]
    planes = entry.planes(config.conditioner, stage.latent_channels)
    if unet.in_channels != stage.latent_channels + planes:
        beside = f" and the conditioner gives {planes} more" if planes else ""
        yield (
            f"unet.in_channels={unet.in_channels} but "
            f"autoencoder.latent_channels={stage.latent_channels}{beside}"
        )
    if unet.out_channels != stage.latent_channels:
        yield (
            f"unet.out_channels={unet.out_channels} but "
            f"autoencoder.latent_channels={stage.latent_channels}"
        )
    levels = len(unet.block_out_channels)
    for name in ("attention", "heads"):
        if len(getattr(unet, name)) != levels:
            yield f"unet.{name} needs {levels} entries, one for each of unet.block_out_channels"
    yield from _sample_sizes(config)
    latent_side = config.data.image_size // stage.downsample_factor
    if latent_side % 2 ** (levels - 1):
        yield (
            f"unet.block_out_channels has {levels} levels, but latents of side {latent_side} "
            f"cannot be halved {levels - 1} times"
        )
    width = config.conditioner.width if entry.has_tokens else 0
    if unet.context_dim != width:
        yield f"unet.context_dim={unet.context_dim} but the conditioner's tokens are {width} wide"
    yield from conditioner_problems(config.conditioner)
    yield from _spatial_problems(config)
    if config.eval.clip_score and not (entry.is_clip or config.eval.clip_model):
        kinds = _kinds(lambda kind: kind.is_clip)
        yield f"eval.clip_score needs conditioner.kind={kinds}, or eval.clip_model"
    if config.data.store_text and not entry.stores_text:
        yield f"data.store_text needs conditioner.kind={_kinds(lambda kind: kind.stores_text)}"
    yield from diffusion_problems(config.diffusion)
    yield from sampler_problems(config.sampler, config.diffusion)
    if config.sample.negative_prompt and config.sampler.guidance_scale == 1:
        yield "sample.negative_prompt does nothing at sampler.guidance_scale=1: raise that"


def _sample_sizes(config: Config) -> Iterator[str]:
    """Yield a line for each side of sampled images that the networks cannot halve."""
    factor, levels = config.autoencoder.downsample_factor, len(config.unet.block_out_channels)
    step = factor * 2 ** (levels - 1)
    for name in ("height", "width"):
        side = getattr(config.sample, name)
        if side % step:
            near = max(1, round(side / step)) * step
            yield (
                f"sample.{name}={side} is no multiple of {step} (first stage {factor}, times "
                f"{step // factor} for the levels of unet.block_out_channels); {near} is"
            )


def _spatial_problems(config: Config) -> Iterator[str]:
    """Yield the contradictions of conditions that are made of images, label maps or boxes."""
    kind = config.conditioner.kind
    for name in CONDITIONERS[kind].reads:
        if not getattr(config.data, name):
            yield f"conditioner.kind={kind} needs data.{name}=true"
    if CONDITIONERS[kind].reads and config.sample.negative_prompt:
        yield f"sample.negative_prompt is of captions, which conditioner.kind={kind} does not read"


def _kinds(has: Callable[[ConditionerEntry], bool]) -> str:
    """Return the kinds of conditioners that have a property, joined by "or"."""
    return " or ".join(kind for kind, entry in CONDITIONERS.items() if has(entry))
