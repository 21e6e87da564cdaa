"""Choices of the options of training, then of evaluation."""

from enum import StrEnum, auto


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; master weights are always fp32."""

    fp32 = auto()
    bf16 = auto()


class Task(StrEnum):
    """Models that `python -m trainer` trains.

    diffusion: The U-Net, on precomputed latents.
    autoencoder: The first stage, on images.
    """

    diffusion = auto()
    autoencoder = auto()


class LrSchedule(StrEnum):
    """The learning rate after warm-up.

    linear: Falls to 0 at train.max_steps.
    cosine: Falls to 0 at train.max_steps as half a cosine.
    """

    constant = auto()
    linear = auto()
    cosine = auto()


class Best(StrEnum):
    """Order of a metric's values."""

    lowest = auto()
    highest = auto()


class WandbMode(StrEnum):
    """Modes of Weights & Biases.

    auto: WANDB_MODE or WANDB_DISABLED; else online where WANDB_API_KEY is set, else offline.
    offline: Keep a local copy for `wandb sync`.
    """

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class SnapshotPrecision(StrEnum):
    """Precision of stored snapshots."""

    fp16 = auto()
    fp32 = auto()


class InceptionResize(StrEnum):
    """Resizing of images to Inception's 299 pixels.

    tensorflow: Like the original code of FID.
    clean: Antialiased, like clean-fid.
    """

    tensorflow = auto()
    clean = auto()


class Dinov2Size(StrEnum):
    """Sizes of DINOv2."""

    small = auto()
    base = auto()
    large = auto()
    giant = auto()


class Features(StrEnum):
    """Networks whose features metrics compare; in logs their names follow those of metrics.

    efficientnet_lite0: For small runs: its weights come with the demo extra.
    inception: Inception v3, the network of FID.
    open_clip: The image tower of eval.clip_model.
    """

    efficientnet_lite0 = auto()
    inception = auto()
    dinov2 = auto()
    open_clip = auto()


class PackVerify(StrEnum):
    """Comparisons of a source with what was packed from it.

    sampled: Names, sizes, times and samples of the bytes.
    full: Every byte.
    """

    sampled = auto()
    full = auto()


class Metric(StrEnum):
    """Metrics on features; the CLIP score has an option of its own.

    frechet: Fréchet distance: FID on inception features.
    kid: Kernel distance, unbiased.
    precision_recall: Precision and recall by nearest neighbours.
    inception_score: On inception features alone.
    cmmd: On open_clip features alone.
    """

    frechet = auto()
    kid = auto()
    precision_recall = auto()
    inception_score = auto()
    cmmd = auto()
