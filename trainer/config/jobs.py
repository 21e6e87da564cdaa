"""Options of the commands beside training and evaluation."""

from dataclasses import dataclass, field

from trainer.config.choices import PackVerify, Precision


@dataclass(slots=True, kw_only=True)
class PackConfig:
    """Limits of `trainer.pack`."""

    max_rejected: float = 0.05
    """[share, ≥ 0, ≤ 1] Packing ends with an error if more of the samples that were found cannot be
    used. A set too small for the share, such as one of 19 for 0.05, may lose two."""
    verify: PackVerify = PackVerify.sampled
    """How a second run finds out whether its source has changed."""
    min_side: int = 0
    """[pixels, ≥ 0, ≤ 65536] Leave out pictures whose short side is smaller; 0: take all."""
    max_enlarge: float = 0.0
    """[1, ≥ 0, ≤ 10^6] Leave out pictures whose short side would grow by a larger factor to
    data.image_size; 0: take all."""
    dry_run: bool = False
    """Say how many samples, shards and bytes packing and precomputing would make, and how long
    packing would take, from a sample of the source."""
    propose: bool = False
    """Look at data.source.path, and print the YAML of an experiment that fits, with reasons."""


@dataclass(slots=True, kw_only=True)
class PrecomputeConfig:
    """One task of a job that encodes images; tasks may run in parallel, and again after a kill."""

    task: int = 0
    """[tasks, ≥ 0, < 10^6] Number of this task, from 0."""
    num_tasks: int = 1
    """[tasks, ≥ 1, ≤ 10^6] Tasks that share the shards."""
    batch_size: int = 64
    """[images, ≥ 1, ≤ 10^6] Images encoded at once."""
    workers: int = 2
    """[processes, ≥ 0, ≤ 1024] Workers that decode and transform images."""
    precision: Precision = Precision.fp32
    """Arithmetic of the encoder."""


@dataclass(slots=True, kw_only=True)
class SampleConfig:
    """Images that `trainer.sample` draws."""

    prompts: list[str] = field(default_factory=list[str])
    """Prompts, or class numbers. An unconditional model needs none."""
    prompts_file: str = ""
    """Text file of more prompts, one a line."""
    height: int = 0
    """[pixels, ≥ 0, ≤ 65536] Height of the images, a multiple of what the networks halve; 0:
    data.image_size. Sizes near that of the training look best."""
    width: int = 0
    """[pixels, ≥ 0, ≤ 65536] Width of the images, like sample.height."""
    images: list[str] = field(default_factory=list[str])
    """super_resolution: paths of pictures to enlarge, of any size. inpainting: pictures with a hole
    to fill."""
    masks: list[str] = field(default_factory=list[str])
    """inpainting: paths of the holes of sample.images, white in the hole and black elsewhere."""
    maps: list[str] = field(default_factory=list[str])
    """semantic_map: paths of label maps, PNG of mode L or P, of any size."""
    boxes: list[str] = field(default_factory=list[str])
    """layout: paths of layouts, JSON lists of {"label", "box"}, as the boxes.json of samples."""
    images_per_prompt: int = 1
    """[images, ≥ 1, ≤ 10^6] Images of each prompt, or of each condition from a file."""
    batch_size: int = 16
    """[images, ≥ 1, ≤ 10^6] Images that a rank draws at once."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from; empty: the null condition."""
    init_image: str = ""
    """Picture to start from; empty: pure noise."""
    strength: float = 0.6
    """[share, > 0, ≤ 1] Noise on sample.init_image: share of the sampler's steps to take, in (0,
    1]."""
    seed: int = 0
    """[1, ≥ 0, < 2^64] Seed of the noise, which depends on (seed, image number) alone."""
    export: str = ""
    """Folder from `trainer.export` to load instead of a checkpoint."""
    out: str = ""
    """Folder of the images; empty: one of its own for each draw, in `samples` of the run folder."""


@dataclass(slots=True, kw_only=True)
class ClipConfig:
    """Output of `trainer.clip`."""

    out: str = "${data.dir}/clip.safetensors"
    """[not empty] File of the trained weights, for conditioner.pretrained; it must not exist."""


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """Output of `trainer.export`."""

    out: str = "${run.dir}/export"
    """[not empty] Folder of the export, for diffusers."""


@dataclass(slots=True, kw_only=True)
class PlanConfig:
    """The machine that `trainer.plan` plans for."""

    gpu: str = "a100_80gb"
    """[not empty] Name of the GPU: one of `cards` in conf/gpus.yaml."""
    nodes: int = 1
    """[nodes, ≥ 1, ≤ 10^6] Number of nodes."""
    gpus_per_node: int = 8
    """[GPUs, ≥ 1, ≤ 1024] GPUs of a node."""
    mfu: float = 0.0
    """[share, ≥ 0, ≤ 1] Part of the GPU's dense peak that products reach in large micro batches; 0:
    that of plan.gpu in conf/gpus.yaml, with or without train.compile. See docs/planning.md."""
    reserve_gib: float = 4.0
    """[GiB, ≥ 0, ≤ 10^4] GPU memory that the plan leaves free: the CUDA context, NCCL, workspaces
    of convolutions, fragments."""
    network_gbit_per_s: float = 0.0
    """[Gbit/s, ≥ 0, ≤ 10^6] Bandwidth of one node to the others; 0: that of NVIDIA's systems with
    plan.gpu, in conf/gpus.yaml for each GPU of the node."""
    store_gib_per_s: float = 2.0
    """[GiB/s, > 0, ≤ 10^6] Bandwidth of the store, for the whole job."""
    price_per_gpu_hour: float = 0.0
    """[currency an hour, ≥ 0, ≤ 10^6] Price of a GPU; 0: no cost in the plan."""
    compare: bool = False
    """Print a table of ZeRO stages, activation checkpointing and micro batches."""
