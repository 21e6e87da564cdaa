"""Options of every network, on one page and without torch, so that a typo answers at once."""

from dataclasses import dataclass, field
from enum import StrEnum


class AutoencoderKind(StrEnum):
    """Which first stage compresses images to latents."""

    kl = "kl"


class ConditionerKind(StrEnum):
    """What the U-Net is conditioned on."""

    none = "none"
    text = "text"
    class_label = "class_label"


class BetaSchedule(StrEnum):
    """How the noise level grows with the timestep."""

    scaled_linear = "scaled_linear"
    linear = "linear"
    cosine = "cosine"


class PredictionType(StrEnum):
    """What the U-Net's output means."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


class LossWeight(StrEnum):
    """How the loss of a timestep is weighted."""

    uniform = "uniform"
    min_snr = "min_snr"


class SamplerName(StrEnum):
    """Which solver turns noise into latents."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


@dataclass(slots=True, kw_only=True)
class FirstStageLossConfig:
    """Weights of the first stage's loss (Rombach et al. 2022, appendix G)."""

    l1_weight: float = 1.0
    """Mean absolute error of the reconstruction."""
    l2_weight: float = 0.0
    """Mean squared error of the reconstruction; PSNR measures this."""
    kl_weight: float = 1e-6
    """KL divergence of the posterior from N(0, I), summed over a latent, averaged over images."""


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
    mid_attention: bool = True
    """One self-attention at the lowest resolution, between two ResBlocks."""
    weights: str = ""
    """A safetensors file with the trained weights; empty trains from scratch."""
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)

    @property
    def downsample_factor(self) -> int:
        """Image pixels a latent pixel spans, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(slots=True, kw_only=True)
class ConditionerConfig:
    """What the U-Net attends to, and how often it is dropped for classifier-free guidance."""

    kind: ConditionerKind = ConditionerKind.text
    model: str = ""
    """An open_clip architecture, such as ViT-H-14, or the path of a model config in JSON."""
    pretrained: str = ""
    """An open_clip tag, such as laion2b_s32b_b79k, or the path of a weights file."""
    penultimate: bool = False
    """Take the hidden states before the last block (as Stable Diffusion 2), not after it."""
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
    """Width of the tokens of the cross-attention; 0: plain self-attention blocks, no context."""
    linear_projection: bool = False
    """Project in and out of transformers by linear layers (SD 2), not 1x1 convolutions (SD 1)."""
    norm_groups: int = 32
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    """The forward process and the training target."""

    schedule: BetaSchedule = BetaSchedule.scaled_linear
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    """Rescale the schedule to end in pure noise (Lin et al. 2024, algorithm 1)."""
    prediction_type: PredictionType = PredictionType.v_prediction
    loss_weight: LossWeight = LossWeight.uniform
    min_snr_gamma: float = 5.0
    """Cap of the signal-to-noise ratio in the min_snr weight (Hang et al. 2023, equation 6)."""


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """How latents are drawn."""

    name: SamplerName = SamplerName.ddim
    steps: int = 50
    guidance_scale: float = 7.5
    """1 is no guidance; w > 1 extrapolates from the null condition (Ho and Salimans 2022)."""
    eta: float = 0.0
    """DDIM's share of fresh noise: 0 deterministic, 1 as DDPM (Song et al. 2021, equation 16)."""
