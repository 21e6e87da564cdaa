"""Options of a run and its training."""

from dataclasses import dataclass, field

from trainer.config.choices import Best, LrSchedule, Precision, SnapshotPrecision, WandbMode


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Name and folder of the run; the same command again resumes the run."""

    experiment: str
    """[not empty] Name of the experiment's file in conf/experiment/."""
    name: str = "default"
    """[not empty] Name of the run, within its experiment."""
    dir: str = "runs/${.experiment}/${.name}"
    """[not empty] Folder of the run: checkpoints, metrics, samples."""
    seed: int = 0
    """[1, ≥ 0, < 2^64] Seed of all random draws in training: initial weights, order of samples,
    noise."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Length, batch and arithmetic of the training."""

    max_steps: int
    """[optimizer steps, ≥ 1, ≤ 10^9] Length of the training."""
    global_batch_size: int
    """[samples, ≥ 1, ≤ 10^8] Size of an optimizer step's batch, over all ranks."""
    micro_batch_size: int
    """[samples, ≥ 1, ≤ 10^6] Size of one forward and backward pass of a rank. Gradients accumulate
    up to the global batch."""
    log_every: int = 50
    """[optimizer steps, ≥ 1, ≤ 10^9] Interval of the lines of metrics."""
    precision: Precision = Precision.fp32
    """Arithmetic of forward and backward passes; master weights are always fp32."""
    compile: bool = False
    """Compile each repeated block of the networks: minutes at the start, then faster steps."""
    channels_last: bool = False
    """Store activations as NHWC: faster on tensor cores, and for first stages on CPUs."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019); the schedule counts optimizer steps."""

    lr: float
    """[1, > 0, ≤ 1000] Learning rate after warm-up; with scale_lr, that of one sample."""
    scale_lr: bool = False
    """Multiply lr by train.global_batch_size, like the base rates of Rombach et al. 2022: they are
    multiplied by the batch of a GPU and by the number of GPUs."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """[1, ≥ 0, < 1, 2 values] Decays of Adam's two moments."""
    eps: float = 1e-8
    """[1, > 0, ≤ 1] Number added to the root of the second moment."""
    weight_decay: float = 0.01
    """[1, ≥ 0, ≤ 1000] Weight decay of weights; biases, norms and other vectors have none."""
    schedule: LrSchedule = LrSchedule.constant
    """Learning rate after warm-up."""
    warmup_steps: int = 0
    """[optimizer steps, ≥ 0, ≤ 10^9] Length of the linear warm-up."""
    max_grad_norm: float = 1.0
    """[1, ≥ 0, ≤ 10^9] Largest norm of the gradients; larger ones are scaled down to it. 0:
    never."""

    def peak_lr(self, global_batch_size: int) -> float:
        """Return the learning rate after warm-up, for a global batch of so many samples."""
        return self.lr * global_batch_size if self.scale_lr else self.lr


@dataclass(slots=True, kw_only=True)
class ReconstructConfig:
    """The average that `trainer.ema` computes from a run's snapshots."""

    sigma_rel: float = 0.1
    """[share of the training, > 0, ≤ 0.28] Width of the average."""
    out: str = "${run.dir}/ema"
    """[not empty] Folder of the averages, one subfolder a width, for checkpoint.load."""


@dataclass(slots=True, kw_only=True)
class EmaConfig:
    """Averages of the weights, in fp32 beside the optimizer state: 4 bytes a parameter each."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """[1, ≥ 0, < 1] Decays of the exponential moving averages, named decay_0.9999. Update t uses t
    / (9 + t) if that is smaller."""
    sigma_rels: list[float] = field(default_factory=list[float])
    """[share of the training, > 0, ≤ 0.28] Widths of the power-function averages (Karras et al.
    2024, section 3), named sigma_rel_0.05."""
    snapshot_every: int = 0
    """[optimizer steps, ≥ 0, ≤ 10^9] Interval of the snapshots of two or more power-function
    averages, from which `trainer.ema` computes any other width; 0: no snapshots."""
    snapshot_precision: SnapshotPrecision = SnapshotPrecision.fp16
    """Precision of stored snapshots."""
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    use: str = ""
    """Name of the average that evaluate, sample and export load; empty: the first."""


@dataclass(slots=True, kw_only=True)
class DeepSpeedConfig:
    """Partition of optimizer state, gradients and weights over ranks (ZeRO)."""

    stage: int = 1
    """[ZeRO stage, ≥ 0, ≤ 3] 0: every rank holds everything. 1: ranks share the optimizer state; 2:
    gradients, too; 3: weights, too."""
    offload_optimizer: bool = False
    """Keep master weights, moments and averages in host memory and update them there. Slower; saves
    12 bytes a parameter, and 4 for each average, divided by the ranks, on the device."""


@dataclass(slots=True, kw_only=True)
class GuardsConfig:
    """Reactions to gradients that are not finite and to spikes of the loss."""

    max_consecutive_skips: int = 20
    """[updates, ≥ 0, ≤ 10^9] Updates in a row that may be skipped because gradients are not finite.
    One more stops the run."""
    spike_factor: float = 0.0
    """[medians of the last 100 losses, 0 or > 1, ≤ 10^6] A larger loss is a spike: the run goes
    back to a checkpoint before the spike and skips the data before it. 0: no guard, because the
    loss of a small batch can double by chance."""
    spike_window: int = 100
    """[steps of data, ≥ 1, ≤ 10^9] Data that a rewind skips; the step of the spike is the last."""
    max_rewinds: int = 5
    """[rewinds, ≥ 0, ≤ 10^6] Rewinds allowed in a run. The next spike stops the run."""


@dataclass(slots=True, kw_only=True)
class WatchdogConfig:
    """Time limits. A job that exceeds one writes the stacks of its ranks and ends."""

    step_timeout_s: float = 1800.0
    """[seconds, ≥ 0, ≤ 10^7] Longest optimizer step, its data included; 0: no limit."""
    pause_timeout_s: float = 21_600.0
    """[seconds, ≥ 0, ≤ 10^7] Longest start, evaluation or save, between two steps; 0: no limit."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Writing and retention of checkpoints."""

    every: int = 1000
    """[optimizer steps, ≥ 1, ≤ 10^9] Interval of checkpoints."""
    keep: int = 2
    """[checkpoints, ≥ 1, ≤ 10^6] Newest checkpoints to keep."""
    keep_every: int = 0
    """[optimizer steps, ≥ 0, ≤ 10^9] Keep also the checkpoints at multiples of this step; 0:
    none."""
    best: str = ""
    """Keep also the best checkpoint by this metric, such as eval/fd_inception; empty: none."""
    best_is: Best = Best.lowest
    """Order of checkpoint.best: the lowest or the highest value is the best."""
    stop_on_failure: bool = False
    """Stop with an error if a checkpoint cannot be written. false: the training continues."""
    patience_s: float = 60.0
    """[seconds, ≥ 0, ≤ 10^7] Longest time that the end of a training waits for a disk that cannot
    be written."""
    load: str = ""
    """Folder of a checkpoint, or of a run for its newest one, for evaluate, sample and export;
    empty: the newest of this run. Training: the weights that a new run begins with: such a folder,
    or a weights file of the network; empty: untrained."""
    load_raw: bool = False
    """Training: begin with the raw weights of checkpoint.load, not with its average ema.use."""
    load_optimizer: bool = False
    """Training: begin with the raw weights, the averages and Adam's moments of checkpoint.load."""


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from the environment only."""

    mode: WandbMode = WandbMode.auto
    """Mode of Weights & Biases."""
    project: str = ""
    """Project of the run; empty: WANDB_PROJECT, or else latent-foundry."""
    entity: str = ""
    """User or team of the run; empty: WANDB_ENTITY, or else the owner of the key."""


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Copies of metrics.jsonl in other services."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
