"""From a raw sample to the members of a shard, and the rules that leave it out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from data.config import DataConfig, FilterConfig
from data.shards import filters
from data.shards.annotations import AnnotationRule, Found
from data.shards.metadata import aspect
from data.sources.samples import RawSample
from data.storage.documents import lookup
from trainer.config import Config


def with_size_rules(config: Config) -> DataConfig:
    """Return the options of the data, with pack.min_side and pack.max_enlarge among the filters."""
    sides = [config.pack.min_side]
    if config.pack.max_enlarge:
        sides.append(round(config.data.image_size / config.pack.max_enlarge))
    rules = [FilterConfig(name="short_side", min=max(sides))] if max(sides) else []
    return replace(config.data, filters=[*config.data.filters, *rules])


def first_to_drop(data: DataConfig, sample: RawSample) -> int | None:
    """Return the number of the rule in data.filters that drops a sample; None if all keep it.

    Raises: BadSampleError where a field cannot be compared.
    """
    return filters.first_to_drop(data.filters, partial(lookup, _fields(sample)))


def members_of(sample: RawSample) -> dict[str, bytes]:
    """Return the members of a sample in a shard: {extension: bytes}."""
    facts = {
        **sample.metadata,
        "width": sample.width,
        "height": sample.height,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
        "source": sample.name,
    }
    label = {} if sample.label is None else {"cls": str(sample.label).encode()}
    return {
        sample.extension: sample.image,
        **label,
        "txt": sample.caption.encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
        **sample.annotations,
    }


def check_annotations(rule: AnnotationRule, sample: RawSample, found: Found) -> None:
    """Check the label map and the boxes of a sample, and add their classes to `found`.

    Raises: BadSampleError as `AnnotationRule.check`.
    """
    rule.check(sample.annotations.get, lambda: (sample.width, sample.height), found)


def _fields(sample: RawSample) -> Mapping[str, Any]:
    """Return the fields of a sample that `data.filters` can name."""
    return {
        **sample.metadata,
        "width": sample.width,
        "height": sample.height,
        "short_side": min(sample.width, sample.height),
        "aspect": aspect(sample.width, sample.height),
        "caption_length": len(sample.caption),
    }
