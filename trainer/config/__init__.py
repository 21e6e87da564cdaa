"""The root of every experiment: one dataclass tree over the pages of options.

The string below an option is its meaning in docs/options.md and `--help`, after its unit and its
domain in brackets; see models/config/domains.py.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from data.config import DataConfig
from models.config import (
    AutoencoderConfig,
    ConditionerConfig,
    DiffusionConfig,
    SamplerConfig,
    UNetConfig,
)
from trainer.config.choices import (
    Best,
    Dinov2Size,
    Features,
    InceptionResize,
    LrSchedule,
    Metric,
    PackVerify,
    Precision,
    SnapshotPrecision,
    Task,
    WandbMode,
)
from trainer.config.evaluation import EvalConfig
from trainer.config.jobs import (
    ClipConfig,
    ExportConfig,
    PackConfig,
    PlanConfig,
    PrecomputeConfig,
    SampleConfig,
)
from trainer.config.training import (
    CheckpointConfig,
    DeepSpeedConfig,
    EmaConfig,
    GuardsConfig,
    LoggerConfig,
    OptimConfig,
    ReconstructConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
    WatchdogConfig,
)

__all__ = [
    "Best",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "DeepSpeedConfig",
    "Dinov2Size",
    "EmaConfig",
    "EvalConfig",
    "ExportConfig",
    "Features",
    "GuardsConfig",
    "InceptionResize",
    "LoggerConfig",
    "LrSchedule",
    "Metric",
    "OptimConfig",
    "PackConfig",
    "PackVerify",
    "PlanConfig",
    "Precision",
    "PrecomputeConfig",
    "ReconstructConfig",
    "RunConfig",
    "SampleConfig",
    "SnapshotPrecision",
    "Task",
    "TrainConfig",
    "WandbConfig",
    "WandbMode",
    "WatchdogConfig",
]


@dataclass(slots=True, kw_only=True)
class Config:
    """One experiment, from raw images to evaluated samples."""

    task: Task = MISSING
    """Model to train."""
    run: RunConfig = field(default_factory=lambda: RunConfig(experiment=MISSING))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            max_steps=MISSING, global_batch_size=MISSING, micro_batch_size=MISSING
        )
    )
    data: DataConfig = field(default_factory=lambda: DataConfig(dir=MISSING, image_size=MISSING))
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=MISSING))
    ema: EmaConfig = field(default_factory=EmaConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    verify: bool = False
    """Let `trainer.pack` read every byte of the data sets again and print differences."""
    stats: bool = False
    """Let `trainer.pack` print sizes, captions and a contact sheet of the data sets."""
    pack: PackConfig = field(default_factory=PackConfig)
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
