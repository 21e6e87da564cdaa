"""The identity of a run: a checkpoint's config against today's, before anything is loaded.

RULES gives every option a rule for each use of a checkpoint. An option without an entry of its own
has the rules of its section.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from data.secrets import public
from data.storage.documents import is_json_object
from trainer.config import Config
from trainer.config.tasks import TASKS
from trainer.runs.record import public_config

SHOWN = 80
"""[characters] Longest value in a printed line."""


class Rule(StrEnum):
    """What a difference between the checkpoint's value of an option and today's means.

    refused: It cannot be right.
    switch: Another number is told; a change from 0 or to 0 is refused, because 0 leaves out a part
        of the network.
    told: It may be meant.
    free: It does not matter, or the content of the files that the option names is compared.
    """

    refused = auto()
    switch = auto()
    told = auto()
    free = auto()


class Use(StrEnum):
    """Uses of a checkpoint.

    resume: A run goes on from it.
    draw: Its averaged weights are sampled, measured or exported.
    begin: A new run begins with its weights.
    """

    resume = auto()
    draw = auto()
    begin = auto()


class Rules(NamedTuple):
    """The rules of an option, by Use."""

    resume: Rule
    draw: Rule
    begin: Rule


_REFUSED, _TOLD, _FREE = Rule.refused, Rule.told, Rule.free
SAME = Rules(_REFUSED, _REFUSED, _REFUSED)
SAME_MODEL = Rules(_REFUSED, _REFUSED, _TOLD)
"""A new run may adapt the weights to another value."""
SAME_TRAINING = Rules(_REFUSED, _FREE, _FREE)
SAME_OBJECTIVE = Rules(_REFUSED, _FREE, _TOLD)
SETTING = Rules(_TOLD, _FREE, _FREE)
CONTENT = Rules(_TOLD, _TOLD, _TOLD)
"""Names weights, whose content is compared where the checkpoint has its hash."""
ELSEWHERE = Rules(_FREE, _FREE, _FREE)

RULES: Mapping[str, Rules] = {
    "task": SAME,
    "run": SETTING,
    "run.dir": ELSEWHERE,
    "run.seed": SAME_TRAINING,
    "train": SETTING,
    "train.global_batch_size": SAME_TRAINING,
    "data": SAME_TRAINING,
    # the order of samples has a hash of the data set, so its folder may move
    "data.dir": ELSEWHERE,
    "data.train": ELSEWHERE,
    "data.val": SETTING,
    "data.latents": ELSEWHERE,
    "data.mixture": ELSEWHERE,
    "data.image_size": Rules(_REFUSED, _TOLD, _TOLD),
    "data.store_text": SETTING,
    "data.store_images": SETTING,
    "data.workers": ELSEWHERE,
    "data.prefetch": ELSEWHERE,
    "data.max_rejected_share": SETTING,
    "data.filters": ELSEWHERE,
    "data.cache": ELSEWHERE,
    "data.source": ELSEWHERE,
    "autoencoder": SAME,
    "autoencoder.codebook_decay": Rules(Rule.switch, _FREE, _TOLD),
    "autoencoder.codebook_revival": SETTING,
    "autoencoder.weights": CONTENT,
    "autoencoder.loss": SETTING,
    "autoencoder.loss.learn_log_variance": Rules(_REFUSED, _FREE, _REFUSED),
    "autoencoder.loss.gan_weight": Rules(Rule.switch, _FREE, _TOLD),
    "autoencoder.loss.discriminator": SAME_OBJECTIVE,
    "conditioner": SAME_MODEL,
    "conditioner.model": CONTENT,
    "conditioner.pretrained": CONTENT,
    "conditioner.cond_drop_prob": SETTING,
    "unet": SAME,
    "unet.in_channels": SAME_MODEL,
    "unet.attention_backend": SETTING,
    "unet.gradient_checkpointing": SETTING,
    "unet.weights": SETTING,
    "unet.widen_input": ELSEWHERE,
    "diffusion": SAME_MODEL,
    # the checkpoint has the scale itself
    "diffusion.latent_scale": SAME_OBJECTIVE,
    "diffusion.scaling_factor": SAME_OBJECTIVE,
    "diffusion.log_sigma_mean": SAME_OBJECTIVE,
    "diffusion.log_sigma_std": SAME_OBJECTIVE,
    "diffusion.loss": SAME_OBJECTIVE,
    "diffusion.loss_weight": SAME_OBJECTIVE,
    "diffusion.min_snr_gamma": SAME_OBJECTIVE,
    "diffusion.offset_noise": SAME_OBJECTIVE,
    # the sampler may go another way through the same noise levels
    "diffusion.sigma_min": Rules(_REFUSED, _TOLD, _TOLD),
    "diffusion.sigma_max": Rules(_REFUSED, _TOLD, _TOLD),
    "diffusion.flow_shift": Rules(_REFUSED, _TOLD, _TOLD),
    "sampler": SETTING,
    "optim": SETTING,
    "ema": SETTING,
    "ema.decays": SAME_TRAINING,
    "ema.sigma_rels": SAME_TRAINING,
    "ema.reconstruct": ELSEWHERE,
    "ema.use": ELSEWHERE,
    "deepspeed": SETTING,
    "guards": SETTING,
    "watchdog": SETTING,
    "checkpoint": SETTING,
    "checkpoint.load": ELSEWHERE,
    "checkpoint.load_raw": ELSEWHERE,
    "checkpoint.load_optimizer": ELSEWHERE,
    "eval": SETTING,
    "eval.images": ELSEWHERE,
    "eval.keep_samples": ELSEWHERE,
    "logger": ELSEWHERE,
    "verify": ELSEWHERE,
    "stats": ELSEWHERE,
    "pack": ELSEWHERE,
    "precompute": ELSEWHERE,
    "clip": ELSEWHERE,
    "sample": ELSEWHERE,
    "export": ELSEWHERE,
    "plan": ELSEWHERE,
}
"""Config path of an option or a section → its rules."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An option whose value in a checkpoint's config is not today's."""

    path: str
    old: Any
    new: Any
    rule: Rule

    def __str__(self) -> str:
        """Return config path, old and new value."""
        return f"{self.path} was {_spelling(self.old)}, is {_spelling(self.new)}"


def find_rules(path: str) -> Rules:
    """Return the rules of an option: its own entry, or that of the nearest section around it."""
    while path and path not in RULES:
        path = path.rpartition(".")[0]
    return RULES.get(path, SAME)


def differences(config: Config, saved: Mapping[str, Any], use: Use) -> list[Difference]:
    """List the options that differ, without those of the rule `free`.

    saved: the checkpoint's config, as JSON values. An option that it lacks had today's default: it
    was added after the checkpoint was written.
    """
    new, old = _leaves(public_config(config)), _leaves(public(saved))
    defaults = _defaults(type(config))
    unread = () if use is Use.draw else TASKS[config.task].unread
    found: list[Difference] = []
    for path in dict.fromkeys([*old, *new]):
        if any(path == name or path.startswith(f"{name}.") for name in unread):
            continue
        before, now = old.get(path, defaults.get(path)), new.get(path)
        if before == now:
            continue
        rule: Rule = getattr(find_rules(path), use)
        if path not in new and rule is not Rule.free:
            rule = Rule.told  # an option of an older version, which nothing reads
        if rule is Rule.switch:
            rule = Rule.told if before and now else Rule.refused
        if rule is not Rule.free:
            found.append(Difference(path, before, now, rule))
    return found


def check_resume(config: Config, saved: Mapping[str, Any], path: Path) -> list[Difference]:
    """Check that a run with this config is the run of a checkpoint; return what else has changed.

    saved: the checkpoint's config; path: the checkpoint.
    Raises: ValueError in one line with old and new value of every option that may not change.
    """
    problem = f"run.dir: {path} is of another run"
    fix = "give the old values to go on with it, or choose another run.name"
    return _accepted(differences(config, saved, Use.resume), problem, fix)


def check_draw(config: Config, saved: Mapping[str, Any], path: Path, option: str) -> str:
    """Check that this config describes the model of a checkpoint.

    saved: the checkpoint's config; path: the checkpoint; option: the config path that names it.
    Returns a line that names what else differs; empty if nothing does.
    Raises: ValueError in one line with old and new value of every option that may not differ.
    """
    problem, fix = f"{option}: {path} is of another model", "give the values of its training"
    told = _accepted(differences(config, saved, Use.draw), problem, fix)
    return f"{path} was trained with other options: {_listed(told)}" if told else ""


def check_begin(config: Config, saved: Mapping[str, Any], path: Path) -> list[Difference]:
    """Check that a new run of this config can begin with a checkpoint's weights.

    saved: the checkpoint's config; path: the checkpoint.
    Returns what else differs in the model.
    Raises: ValueError in one line with old and new value of every option that may not differ.
    """
    problem = f"checkpoint.load: {path} is of another network"
    fix = "give the values of its training, or other weights"
    return _accepted(differences(config, saved, Use.begin), problem, fix)


def _accepted(found: list[Difference], problem: str, fix: str) -> list[Difference]:
    """Return the differences to tell; raises ValueError if any is refused."""
    if refused := [one for one in found if one.rule is Rule.refused]:
        raise ValueError(f"{problem}: {_listed(refused)}; {fix}")
    return [one for one in found if one.rule is Rule.told]


def _listed(found: list[Difference]) -> str:
    return "; ".join(str(one) for one in found)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by path; a list is one value."""
    return dict(_walk(tree, prefix))


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if is_json_object(value):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _defaults(kind: type[Config]) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(OmegaConf.structured(kind), enum_to_str=True)
    return _leaves(tree)


def _spelling(value: Any) -> str:
    """Spell a value like a command line does."""
    text = value if isinstance(value, str) and value else json.dumps(value, separators=(",", ":"))
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
