"""Options of every network, on one page and without torch, so that a typo answers at once."""

from dataclasses import dataclass, field
from enum import StrEnum


class AutoencoderKind(StrEnum):
    """Which first stage compresses images to latents."""

    kl = "kl"
    vq = "vq"


class ConditionerKind(StrEnum):
    """What the U-Net is conditioned on."""

    none = "none"
    text = "text"
    transformers = "transformers"
    class_label = "class_label"


class TextFeatures(StrEnum):
    """What a text encoder gives the U-Net."""

    last = "last"
    penultimate = "penultimate"
    pooled = "pooled"


class NoiseSchedule(StrEnum):
    """How the noise level grows with the timestep; edm and flow are continuous."""

    scaled_linear = "scaled_linear"
    linear = "linear"
    cosine = "cosine"
    edm = "edm"
    flow = "flow"


class AttentionBackend(StrEnum):
    """What computes attention; auto is xformers where it can train, else torch's own."""

    auto = "auto"
    xformers = "xformers"
    sdpa = "sdpa"
    reference = "reference"


class PredictionType(StrEnum):
    """What the U-Net's output means."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"
    flow = "flow"


class LossWeight(StrEnum):
    """How the loss of a timestep is weighted."""

    uniform = "uniform"
    min_snr = "min_snr"
    edm = "edm"


class SamplerName(StrEnum):
    """Which solver turns noise into latents."""

    ddim = "ddim"
    plms = "plms"
    euler = "euler"
    euler_ancestral = "euler_ancestral"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"


class PerceptualFeatures(StrEnum):
    """Whose activations the perceptual distance compares."""

    vgg16 = "vgg16"
    """LPIPS (Zhang et al. 2018), with its authors' weights of the channels."""
    efficientnet_lite0 = "efficientnet_lite0"
    """All channels alike; the network comes with the demo extra, and needs no download."""


class DiscriminatorNorm(StrEnum):
    """What the discriminator's layers are normalised by."""

    group = "group"
    """Each image by itself: the same for any micro batch and number of ranks."""
    batch = "batch"
    """The micro batch of a rank, as in the paper: its loss curve depends on how they are cut."""


@dataclass(slots=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator (Isola et al. 2017, appendix 6.1.2)."""

    channels: int = 64
    """Of the first layer; each next one has twice as many, up to eight times."""
    layers: int = 3
    """Layers that halve the resolution."""
    norm: DiscriminatorNorm = DiscriminatorNorm.group


@dataclass(slots=True, kw_only=True)
class FirstStageLossConfig:
    """Weights of the first stage's loss (Rombach et al. 2022, appendix G; Esser et al. 2021)."""

    l1_weight: float = 1.0
    """Mean absolute error of the reconstruction."""
    l2_weight: float = 0.0
    """Mean squared error of the reconstruction; PSNR measures this."""
    perceptual_weight: float = 1.0
    """Perceptual distance; 0 needs none of its weights."""
    perceptual_features: PerceptualFeatures = PerceptualFeatures.vgg16
    perceptual_weights: str = ""
    """vgg16: the file of torchvision's weights, vgg16-397923af.pth; empty downloads them."""
    learn_log_variance: bool = True
    """Divide the error by a learned variance, and add its logarithm."""
    gan_weight: float = 0.5
    """Adversarial term, in multiples of the weight at which its gradient at the decoder's last
    layer is as large as the error's (Esser et al. 2021, equation 7); 0 trains no discriminator."""
    gan_start_step: int = 50_001
    """The first optimizer step, from 1, that trains a discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    kl_weight: float = 1e-6
    """kl: divergence of the posterior from N(0, I), against the error, both summed over an
    image's values: as in the paper's code, a tiny share of an error that is a mean here."""
    codebook_weight: float = 1.0
    """vq: what pulls codes and latents together, the commitment included."""


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig:
    """The first stage; field names as in diffusers' AutoencoderKL."""

    kind: AutoencoderKind = AutoencoderKind.kl
    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels of each level, highest resolution first; n levels downsample by 2^(n-1)."""
    layers_per_block: int = 2
    """ResBlocks a level in the encoder; the decoder has one more."""
    norm_groups: int = 32
    attention_levels: list[int] = field(default_factory=list)
    """Levels, 0 the highest resolution, whose every ResBlock is followed by self-attention."""
    mid_attention: bool = True
    """One self-attention at the lowest resolution, between two ResBlocks."""
    num_embeddings: int = 8192
    """vq: codes in the codebook."""
    codebook_decay: float = 0.0
    """vq: above 0, codes are moving averages of their latents; else they learn by gradient."""
    codebook_revival: float = 0.0
    """vq with codebook_decay: a code that fewer latents than this choose at a step, by the moving
    average, is moved to one of them (Dhariwal et al. 2020, appendix A)."""
    weights: str = ""
    """A file of trained weights: ours, diffusers' or CompVis'; empty trains from scratch."""
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)

    @property
    def downsample_factor(self) -> int:
        """Image pixels a latent pixel spans, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(slots=True, kw_only=True)
class ConditionerConfig:
    """What the U-Net attends to, and how often it is dropped for classifier-free guidance."""

    kind: ConditionerKind = ConditionerKind.text
    """text: a CLIP by open_clip; transformers: any text encoder of that library."""
    model: str = ""
    """text: an open_clip architecture, such as ViT-H-14, or the path of a model config in JSON."""
    pretrained: str = ""
    """text: an open_clip tag, such as laion2b_s32b_b79k, or the path of a weights file.
    transformers: a name on the Hugging Face hub, or the path of a folder."""
    features: TextFeatures = TextFeatures.last
    """last: tokens after the last block; penultimate: before it (text, as Stable Diffusion 2);
    pooled: one token, CLIP's embedding of the text, or the mean of the tokens (transformers)."""
    context_length: int = 77
    """transformers: tokens of a caption; longer ones are cut, shorter ones padded and masked."""
    num_classes: int = 0
    """Classes of a class_label conditioner; the null class is one more."""
    width: int = 1024
    """Width of a token; the U-Net's context_dim."""
    cond_drop_prob: float = 0.1
    """Share of samples trained with the null condition (Ho and Salimans 2022)."""


@dataclass(slots=True, kw_only=True)
class UNetConfig:
    """The denoiser; a level is one resolution, highest first."""

    in_channels: int = 4
    """Latent channels, and those of a spatial condition, which is concatenated to the latents."""
    out_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """Channels of each level."""
    layers_per_block: int = 2
    """ResBlocks a level on the way down; one more on the way up."""
    attention: list[bool] = field(default_factory=lambda: [True, True, True, False])
    """Whether the level's ResBlocks are followed by attention; the middle always has one."""
    heads: list[int] = field(default_factory=lambda: [8, 8, 8, 8])
    """Attention heads of each level; the middle takes the last level's."""
    transformer_depth: int = 1
    """Transformer blocks in each attention."""
    context_dim: int = 1024
    """Width of the conditioner's tokens; 0: no conditioner, and plain self-attention blocks."""
    add_context: bool = False
    """Add the one token, as of a class, to the time embedding and do not attend to it."""
    linear_projection: bool = False
    """Project in and out of transformers by linear layers (SD 2), not 1x1 convolutions (SD 1)."""
    scale_shift_norm: bool = False
    """Tell ResBlocks the time by scaling and shifting a normalised layer, not by adding to it."""
    resblock_updown: bool = False
    """Change the resolution in ResBlocks, not by convolutions."""
    norm_groups: int = 32
    attention_backend: AttentionBackend = AttentionBackend.auto
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    weights: str = ""
    """A file to start training from: ours, diffusers' or CompVis'; empty trains from scratch."""


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    """The forward process and the training target."""

    schedule: NoiseSchedule = NoiseSchedule.scaled_linear
    num_timesteps: int = 1000
    """Levels of a discrete schedule; flow tells the U-Net its time in [0, 1] times this."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    """Rescale betas to end in pure noise (Lin et al. 2024, algorithm 1)."""
    log_sigma_mean: float = 0.0
    """edm and flow: mean of log(noise / signal) in training (the papers' P_mean and m)."""
    log_sigma_std: float = 1.0
    """edm and flow: standard deviation of log(noise / signal) in training (P_std and s)."""
    sigma_min: float = 0.004
    """edm: the last noise / signal in sampling, in standard deviations of the latents."""
    sigma_max: float = 160.0
    """edm: the first noise / signal in sampling, in standard deviations of the latents."""
    flow_shift: float = 1.0
    """flow: above 1 moves times towards noise, for many latents (Esser et al. 2024, eq. 23)."""
    prediction_type: PredictionType = PredictionType.v_prediction
    loss_weight: LossWeight = LossWeight.uniform
    min_snr_gamma: float = 5.0
    """Cap of the signal-to-noise ratio in the min_snr weight (Hang et al. 2023, equation 6)."""
    offset_noise: float = 0.0
    """Deviation of noise added to whole channels, for very dark and bright images; 0 is none."""


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """How latents are drawn."""

    name: SamplerName = SamplerName.ddim
    steps: int = 50
    """Steps from noise to latents; each asks the U-Net once, or twice with heun."""
    guidance_scale: float = 7.5
    """1 is no guidance; w > 1 extrapolates from the null condition (Ho and Salimans 2022)."""
    guidance_rescale: float = 0.0
    """Share of the contrast added by guidance to take back (Lin et al. 2024, equation 16)."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Guide where the noise, from 0 to 1, is within (Kynkäänniemi et al. 2024); faster, too."""
    eta: float = 0.0
    """DDIM's share of fresh noise: 0 deterministic, 1 as DDPM (Song et al. 2021, equation 16)."""
