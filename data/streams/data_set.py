"""Open the data sets of a config for streams."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from data.config import DataConfig
from data.order.lanes import LanePlan
from data.order.mixture import MixturePlan, join_latents, share_lanes
from data.order.plan import Plan
from data.shards.annotations import AnnotationRule, Labels
from data.shards.captions import CaptionRule
from data.shards.manifest import Kind, Manifest, ManifestError
from data.shards.reader import ShardReader


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDataSet:
    """A data set with its manifest and reader; a mixture of several reads as one."""

    option: str
    """Config path that names the data set, for errors."""
    command: str
    """Command that makes the data set, for errors."""
    manifest: Manifest
    reader: ShardReader
    identity: str
    """Hash of the samples and their numbers."""
    caption_rules: Sequence[CaptionRule]
    """Places of captions: of the data set, or of each set of a mixture."""
    caption_rule: Callable[[str], CaptionRule]
    """Name of a shard → place of its captions."""
    make_plan: Callable[..., Plan]
    """(seed, lanes, block, global_batch) → the order of the samples in training."""


def open_data_set(
    folder: str, kind: Kind, config: DataConfig, *, option: str, command: str
) -> OpenDataSet:
    """Open the data set in a folder.

    folder: path or URL. option: config path that names the folder, for errors. command: command
    that makes the data set, for errors.
    Raises: ManifestError where the data set is missing, damaged or of another kind.
    """
    manifest, rule = _load(folder, kind, option, command), CaptionRule.of(config)
    return OpenDataSet(
        option=option,
        command=command,
        manifest=manifest,
        reader=ShardReader(folder, manifest, config.cache, source=config.source.path),
        identity=manifest.hash,
        caption_rules=[rule],
        caption_rule=lambda _: rule,
        make_plan=partial(LanePlan, manifest.shard_sizes),
    )


def open_mixture(config: DataConfig, *, command: str) -> OpenDataSet:
    """Open the sets of latents in data.mixture as one data set.

    command: command that makes the sets, for errors.
    Raises: ManifestError where a set is missing, damaged or of another layout than the others;
    ValueError where the weights do not give each set a lane.
    """
    folders = [item.latents for item in config.mixture]
    weights = [item.weight for item in config.mixture]
    manifests = [
        _load(folder, Kind.latents, f"data.mixture[{number}].latents", command)
        for number, folder in enumerate(folders)
    ]
    folder, manifest = join_latents(folders, manifests, weights)
    rules = [CaptionRule.of(config, item) for item in config.mixture]
    of_each = zip(rules, manifests, strict=True)
    repeated = [rule for rule, one in of_each for _ in one.shards]
    names = (shard.name for shard in manifest.shards)
    text = json.dumps([manifest.hash, share_lanes(weights, config.lanes).tolist()])
    return OpenDataSet(
        option="data.mixture",
        command=command,
        manifest=manifest,
        reader=ShardReader(folder, manifest, config.cache),
        identity=hashlib.sha256(text.encode()).hexdigest(),
        caption_rules=rules,
        caption_rule=dict(zip(names, repeated, strict=True)).__getitem__,
        make_plan=partial(MixturePlan, [one.shard_sizes for one in manifests], weights),
    )


def annotation_rule(config: DataConfig, manifest: Manifest, option: str) -> AnnotationRule:
    """Return the annotations that a config asks of a data set, with the classes of its manifest.

    Raises: ValueError where the data set has none.
    """
    for name, there in (("maps", manifest.map_classes), ("boxes", manifest.box_classes)):
        if getattr(config, name) and not there:
            raise ValueError(
                f"data.{name}: {option} has none; set data.{name}=false, or delete the folder and "
                f"make it again with data.{name}=true"
            )
    labels = Labels(tuple(manifest.map_classes), tuple(manifest.box_classes))
    return AnnotationRule(config.maps, config.boxes, labels)


def _load(folder: str, kind: Kind, option: str, command: str) -> Manifest:
    manifest = Manifest.load(folder, option=option, command=command)
    if manifest.kind is not kind:
        raise ManifestError(f"{option}: {folder} holds {manifest.kind}, not {kind}")
    return manifest
