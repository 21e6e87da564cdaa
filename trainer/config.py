"""The root of every experiment: one dataclass tree over the three config pages."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from data.config import DataConfig
from models.config import (
    AutoencoderConfig,
    ConditionerConfig,
    DiffusionConfig,
    SamplerConfig,
    UNetConfig,
)


class Task(StrEnum):
    """What `python -m trainer` trains."""

    diffusion = "diffusion"
    autoencoder = "autoencoder"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class LrSchedule(StrEnum):
    """The learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Best(StrEnum):
    """Which value of a metric is the best."""

    lowest = "lowest"
    highest = "highest"


class WandbMode(StrEnum):
    """auto: online where WANDB_API_KEY is set, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Features(StrEnum):
    """Networks whose features describe images; their names end those of the metrics."""

    efficientnet_lite0 = "efficientnet_lite0"
    inception = "inception"
    dinov2 = "dinov2"
    open_clip = "open_clip"


class Metric(StrEnum):
    """What is measured on the features; the CLIP score has an option of its own."""

    frechet = "frechet"
    kid = "kid"
    precision_recall = "precision_recall"
    inception_score = "inception_score"
    cmmd = "cmmd"


class InceptionResize(StrEnum):
    """How images come to Inception's 299 px: as in FID's own code, or antialiased (clean-fid)."""

    tensorflow = "tensorflow"
    clean = "clean"


class Dinov2Size(StrEnum):
    """Which DINOv2."""

    small = "small"
    base = "base"
    large = "large"
    giant = "giant"


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Names the run and its folder; the same command again resumes it."""

    experiment: str
    """The experiment file's name."""
    name: str = "default"
    dir: str = "runs/${.experiment}/${.name}"
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """How long and how wide."""

    max_steps: int
    """Optimizer steps."""
    global_batch_size: int
    """Samples an optimizer step, over all ranks: the experiment's truth."""
    micro_batch_size: int
    """Samples a rank takes at once; gradients accumulate up to the global batch."""
    log_every: int = 50
    """Steps between lines of metrics."""
    precision: Precision = Precision.fp32
    compile: bool = False
    """Compile each repeated block of the networks: minutes at the start, then faster steps."""
    channels_last: bool = False
    """Store activations as NHWC: faster on tensor cores, and for first stages on CPUs."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019); the schedule counts optimizer steps."""

    lr: float
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: LrSchedule = LrSchedule.constant
    warmup_steps: int = 0
    max_grad_norm: float = 1.0


class SnapshotPrecision(StrEnum):
    """How snapshots of averages are stored."""

    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(slots=True, kw_only=True)
class ReconstructConfig:
    """What `trainer.ema` makes of a run's snapshots."""

    sigma_rel: float = 0.1
    """The width wanted, as a share of the training."""
    out: str = "${run.dir}/ema"
    """Each width gets a folder of its own in it, for checkpoint.load."""


@dataclass(slots=True, kw_only=True)
class EmaConfig:
    """Averages of the weights, in fp32 beside the optimizer state: 4 bytes a parameter each."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """Exponential moving averages: the ceilings of their decays; update t uses t / (9 + t), if
    smaller. An average is called decay_0.9999."""
    sigma_rels: list[float] = field(default_factory=list)
    """Power-function averages (Karras et al. 2024, section 3): their widths, as shares of the
    training. An average is called sigma_rel_0.05."""
    snapshot_every: int = 0
    """Optimizer steps between snapshots of two such averages or more, of which trainer.ema makes
    any other width; 0 takes none."""
    snapshot_precision: SnapshotPrecision = SnapshotPrecision.fp16
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    use: str = ""
    """The average that evaluate, sample and export take; empty takes the first."""


@dataclass(slots=True, kw_only=True)
class DeepSpeedConfig:
    """How optimizer state, gradients and weights are spread over ranks (ZeRO)."""

    stage: int = 1
    """0: every rank has all; 1 spreads the optimizer state, 2 gradients, too, 3 weights, too."""
    offload_optimizer: bool = False
    """Keep master weights, moments and averages in host memory, and update them there: slower, and
    12 bytes a parameter and 4 an average, divided by the ranks, less on the device."""


@dataclass(slots=True, kw_only=True)
class GuardsConfig:
    """What a run does about steps that go wrong."""

    max_consecutive_skips: int = 20
    """Updates in a row that gradients which are not finite may prevent; then the run stops."""
    spike_factor: float = 0.0
    """A loss of more than so many medians of the last 100 steps is a spike: the run rewinds to a
    checkpoint before it and skips the data that led to it. 0: never, since the loss of a batch of
    a few dozen may double by chance."""
    spike_window: int = 100
    """Steps of data that a rewind skips; the spike's own is the last of them."""
    max_rewinds: int = 5
    """Rewinds of a run; then a spike stops it."""


@dataclass(slots=True, kw_only=True)
class WatchdogConfig:
    """When a job counts as hung: every rank's stack is then written, and the job ends."""

    step_timeout_s: float = 1800.0
    """Longest optimizer step, its data included; 0: without end."""
    pause_timeout_s: float = 21_600.0
    """Longest anything else: the start, an evaluation, a save; 0: without end."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000
    """Optimizer steps."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Those at multiples of so many steps stay, too; 0 for none."""
    best: str = ""
    """So does the best by this metric, named as it is logged: eval/fd_inception."""
    best_is: Best = Best.lowest
    stop_on_failure: bool = False
    """Stop with an error when one cannot be written, as on a full disk, instead of going on."""
    load: str = ""
    """A checkpoint folder for evaluate, sample and export; empty takes the run's latest."""


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """The evaluation protocol: its hash is logged with every number."""

    every: int = 0
    """Optimizer steps between evaluations while training; 0 evaluates at the end only."""
    num_samples: int = 2048
    batch_size: int = 64
    seed: int = 0
    """Sample i's noise depends on (seed, i) alone."""
    features: list[Features] = field(default_factory=lambda: [Features.inception])
    """Each gives its own number of each metric, named after it."""
    metrics: list[Metric] = field(default_factory=lambda: [Metric.frechet])
    """inception_score is of inception alone, cmmd of open_clip alone; the others are of all."""
    clip_score: bool = False
    """Score samples against their prompts."""
    reference_samples: int = 0
    """Training images to compare with, drawn by eval.seed; 0 takes all."""
    references: str = "${data.dir}/references"
    """A local folder for the features of training images, made once by the first to need them."""
    inception_weights: str = ""
    """torch-fidelity's Inception weights; empty downloads them."""
    inception_resize: InceptionResize = InceptionResize.tensorflow
    dinov2_size: Dinov2Size = Dinov2Size.large
    dinov2_weights: str = ""
    """DINOv2's weights, as its authors or timm give them; empty downloads them."""
    clip_model: str = ""
    """open_clip's architecture for clip_score and open_clip features; empty: the conditioner's."""
    clip_pretrained: str = ""
    """Its weights, by tag or path; empty: the conditioner's."""
    kid_subset_size: int = 1000
    """KID is the mean over 100 random subsets of this size."""
    images: str = ""
    """trainer.evaluate: a folder of images to measure in the place of a checkpoint's samples."""
    keep_samples: bool = False
    """trainer.evaluate: write the samples that are measured as PNGs."""
    prompts: list[str] = field(default_factory=list)
    """Prompts (or class numbers) of the sample grid, with seeds 0, 1, …"""


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from the environment only."""

    mode: WandbMode = WandbMode.auto
    project: str = "latent-foundry"
    entity: str = ""


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics go beside the run's metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(slots=True, kw_only=True)
class PrecomputeConfig:
    """One task of a latent job; any number of tasks may run, die and be run again."""

    task: int = 0
    num_tasks: int = 1
    batch_size: int = 64
    precision: Precision = Precision.fp32
    workers: int = 2
    """Processes that decode and transform images while others are encoded."""


@dataclass(slots=True, kw_only=True)
class SampleConfig:
    """What `trainer.sample` draws."""

    prompts: list[str] = field(default_factory=list)
    prompts_file: str = ""
    """A text file of more prompts, one a line."""
    images_per_prompt: int = 1
    batch_size: int = 16
    """Images a rank draws at once."""
    negative_prompt: str = ""
    """What guidance leads away from; empty is the null condition."""
    init_image: str = ""
    """A picture to start from, instead of pure noise."""
    strength: float = 0.6
    """How far init_image is noised: the share of the sampler's steps that are taken, in (0, 1]."""
    seed: int = 0
    """Image i's noise depends on (seed, i) alone: another batch size or more images change none."""
    export: str = ""
    """A folder that `trainer.export` wrote, to draw from instead of a checkpoint."""
    out: str = "${run.dir}/samples"


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """Where `trainer.export` writes."""

    out: str = "${run.dir}/export"


@dataclass(slots=True, kw_only=True)
class PlanConfig:
    """The machine that `trainer.plan` plans for; no other command reads this."""

    gpu: str = "a100_80gb"
    """A name in conf/plan/gpus.yaml."""
    nodes: int = 1
    gpus_per_node: int = 8
    mfu: float = 0.23
    """Share of the GPU's dense peak that forward and backward passes reach; docs/planning.md."""
    reserve_gib: float = 4.0
    """GPU memory for what no plan sees: the CUDA context, NCCL, convolutions' workspaces,
    fragments."""
    network_gbit_per_s: float = 400.0
    """Of one node to the others."""
    store_gib_per_s: float = 2.0
    """What the store gives to, and takes from, the whole job."""
    price_per_gpu_hour: float = 0.0
    """In any currency; 0 leaves the cost out."""
    compare: bool = False
    """Tabulate ZeRO stages, activation checkpointing and micro batches."""


@dataclass(slots=True, kw_only=True)
class Config:
    """One experiment, from raw images to evaluated samples."""

    task: Task = MISSING
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
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    verify: bool = False
    """trainer.pack: read every byte of the data sets again and print what differs."""
    stats: bool = False
    """trainer.pack: show what the data sets hold, in numbers and a contact sheet."""
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
