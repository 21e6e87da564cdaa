"""Tables of the metrics, and of the networks whose features they compare.

Checks, evaluations and the report read these tables. Config pages do not import torch, so an entry
names its function by `module:function`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainer.config.choices import Features, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """How the report shows a number of an evaluation."""

    title: str
    unit: str = ""
    higher_is_better: bool = False
    from_zero: bool = False
    """Whether the axis of its chart starts at 0."""
    titles: Mapping[Features, str] = field(default_factory=dict[Features, str])
    """Other titles on certain features, such as FID for a Fréchet distance on Inception."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesEntry:
    """A feature extractor."""

    title: str
    build: str
    """Maps (EvalConfig, function that loads the CLIP of evaluations) to an extractor on the CPU."""
    is_clip: bool = False
    """Whether the extractor is the CLIP of evaluations: eval.clip_model or the conditioner's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricEntry:
    """A metric on features."""

    compute: str
    """Maps (samples, reference, extractor, EvalConfig) to values by the names of `numbers`. The
    first two are FeatureSets. NAME_std is the standard deviation of NAME."""
    numbers: Mapping[str, Number]
    """The numbers. In logs the name of the features follows theirs, unless `features` is set."""
    needs_rows: bool = True
    """Whether the metric needs all features, and not only their mean and covariance."""
    least_samples: int = 1
    """Smallest number of samples for which the metric is defined."""
    least_option: str = ""
    """Name of an option of eval.* that replaces least_samples."""
    features: Features | None = None
    """The only features on which the metric is defined; None: any."""


FEATURES = {
    Features.efficientnet_lite0: FeaturesEntry(
        title="EfficientNet-Lite0", build="trainer.metrics.efficientnet:build"
    ),
    Features.inception: FeaturesEntry(title="Inception", build="trainer.metrics.inception:build"),
    Features.dinov2: FeaturesEntry(title="DINOv2", build="trainer.metrics.dinov2:build"),
    Features.open_clip: FeaturesEntry(
        title="CLIP", build="trainer.metrics.clip_features:build", is_clip=True
    ),
}

METRICS = {
    Metric.frechet: MetricEntry(
        compute="trainer.metrics.frechet:compute",
        numbers={
            "fd": Number(
                title="Fréchet distance", from_zero=True, titles={Features.inception: "FID"}
            )
        },
        needs_rows=False,
        least_samples=2,
    ),
    Metric.kid: MetricEntry(
        compute="trainer.metrics.mmd:compute_kid",
        numbers={"kid": Number(title="KID")},
        least_option="kid_subset_size",
    ),
    Metric.precision_recall: MetricEntry(
        compute="trainer.metrics.precision_recall:compute",
        numbers={
            "precision": Number(title="Precision", higher_is_better=True),
            "recall": Number(title="Recall", higher_is_better=True),
        },
        least_samples=4,
    ),
    Metric.inception_score: MetricEntry(
        compute="trainer.metrics.inception_score:compute",
        numbers={"inception_score": Number(title="Inception score", higher_is_better=True)},
        least_samples=10,
        features=Features.inception,
    ),
    Metric.cmmd: MetricEntry(
        compute="trainer.metrics.mmd:compute_cmmd",
        numbers={"cmmd": Number(title="CMMD")},
        features=Features.open_clip,
    ),
}

OF_IMAGES = {
    "clip_score": Number(title="CLIP score", higher_is_better=True),
    "clip_score_shuffled": Number(title="CLIP score of other prompts"),
    "psnr_db": Number(title="PSNR of reconstructions", unit="dB", higher_is_better=True),
    "ssim": Number(title="SSIM of reconstructions", higher_is_better=True),
    "lpips": Number(title="LPIPS of reconstructions"),
    "rfid": Number(title="FID of reconstructions", from_zero=True),
    "codebook_used_share": Number(title="Share of codes in use", higher_is_better=True),
    "codebook_perplexity": Number(title="Perplexity of codes", higher_is_better=True),
}
"""Numbers of no metric in METRICS, by their names in logs."""
OF_RECONSTRUCTIONS = {
    "rfd": Number(title="Fréchet distance of reconstructions", from_zero=True),
}
"""Numbers of no metric in METRICS, whose names in logs end in the name of the features."""


def logged_name(metric: Metric, name: str, features: Features) -> str:
    """Return the name in logs of one of a metric's numbers: kid_std → kid_inception_std."""
    if METRICS[metric].features is not None:
        return name
    stem = name.removesuffix("_std")
    return f"{stem}_{features}{name[len(stem) :]}"


def find_number(name: str) -> Number:
    """Return the entry of a number by its name in logs, without `eval/`.

    A name that no table has becomes a title.
    """
    return _numbers().get(name, Number(title=name))


def axis_label(name: str) -> str:
    """Return what an axis of this number says: its title, its unit, and which end is better."""
    better = "higher" if find_number(name).higher_is_better else "lower"
    return f"{title_and_unit(name)}, {better} is better"


def title_and_unit(name: str) -> str:
    """Return the heading of a column of this number."""
    number = find_number(name)
    return f"{number.title} [{number.unit}]" if number.unit else number.title


def _numbers() -> dict[str, Number]:
    """Collect the entries of all tables by their names in logs."""
    found = dict(OF_IMAGES)
    on_all = dict(OF_RECONSTRUCTIONS)
    for entry in METRICS.values():
        (on_all if entry.features is None else found).update(entry.numbers)
    for stem, number in on_all.items():
        for features, network in FEATURES.items():
            title = f"{number.titles.get(features, number.title)} ({network.title})"
            found[f"{stem}_{features}"] = replace(number, title=title)
    return found
