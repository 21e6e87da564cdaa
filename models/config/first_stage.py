"""Options of the first stage and of its training."""

from dataclasses import dataclass, field

from models.config.choices import AutoencoderKind, DiscriminatorNorm, PerceptualFeatures


@dataclass(slots=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator (Isola et al. 2017, appendix 6.1.2)."""

    channels: int = 64
    """[channels, ≥ 1, ≤ 65536] Width of the first layer; each layer doubles it, up to 8 times the
    first."""
    layers: int = 3
    """[layers, ≥ 1, ≤ 15] Layers that halve the resolution."""
    norm: DiscriminatorNorm = DiscriminatorNorm.group
    """Normalisation layer."""


@dataclass(slots=True, kw_only=True)
class FirstStageLossConfig:
    """Weights of the first stage's loss (Rombach et al. 2022, appendix G; Esser et al. 2021)."""

    l1_weight: float = 1.0
    """[1, ≥ 0, ≤ 10^9] Weight of the mean absolute error of the reconstruction."""
    l2_weight: float = 0.0
    """[1, ≥ 0, ≤ 10^9] Weight of the mean squared error of the reconstruction, which PSNR
    measures."""
    perceptual_weight: float = 1.0
    """[1, ≥ 0, ≤ 10^9] Weight of the perceptual distance; 0: its network is not loaded."""
    perceptual_features: PerceptualFeatures = PerceptualFeatures.vgg16
    """Network of the perceptual distance."""
    perceptual_weights: str = ""
    """vgg16: path of torchvision's weights, vgg16-397923af.pth; empty: download them."""
    learn_log_variance: bool = True
    """Divide the error by a learned variance, and add its logarithm."""
    gan_weight: float = 0.5
    """[1, ≥ 0, ≤ 10^9] Weight of the adversarial term. At 1, its gradient at the decoder's last
    layer is as large as the error's (Esser et al. 2021, equation 7). 0: no discriminator."""
    gan_start_step: int = 50_001
    """[optimizer steps, ≥ 1, ≤ 10^9] First step, counted from 1, that trains a discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    kl_weight: float = 1e-6
    """[1, ≥ 0, ≤ 10^9] kl: weight of the posterior's divergence from N(0, I). Error and divergence
    are sums over an image's values, as in the paper's code."""
    codebook_weight: float = 1.0
    """[1, ≥ 0, ≤ 10^9] vq: weight of the distance of codes and latents, the commitment loss
    included."""


@dataclass(slots=True, kw_only=True)
class AutoencoderConfig:
    """The first stage; field names as in diffusers' AutoencoderKL."""

    kind: AutoencoderKind = AutoencoderKind.kl
    """Kind of first stage."""
    in_channels: int = 3
    """[channels, ≥ 1, ≤ 65536] Channels of an image."""
    latent_channels: int = 4
    """[channels, ≥ 1, ≤ 65536] Channels of a latent."""
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """[channels, ≥ 1, ≤ 65536, 1+ values] Width of each level, highest resolution first; n levels
    downsample by 2^(n-1)."""
    layers_per_block: int = 2
    """[ResBlocks, ≥ 1, ≤ 100] Blocks a level in the encoder; the decoder has one more."""
    norm_groups: int = 32
    """[groups, ≥ 1, ≤ 65536] Groups of channels in group normalisation."""
    attention_levels: list[int] = field(default_factory=list[int])
    """[levels, ≥ 0, ≤ 15] Levels with self-attention after every ResBlock; 0: the highest
    resolution."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution, between two ResBlocks."""
    num_embeddings: int = 8192
    """[codes, ≥ 1, ≤ 10^8] vq: size of the codebook."""
    codebook_decay: float = 0.0
    """[1, ≥ 0, < 1] vq: decay of the moving averages of latents that replace codes; 0: codes are
    trained by gradient."""
    codebook_revival: float = 0.0
    """[latents a step, ≥ 0, ≤ 10^9] vq with codebook_decay: a code with a smaller moving average of
    its count is replaced by a latent of the batch (Dhariwal et al. 2020, appendix A); 0: never."""
    weights: str = ""
    """Path of trained weights: ours, diffusers' or CompVis'; empty: train from scratch."""
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)

    @property
    def downsample_factor(self) -> int:
        """Side of an image divided by the side of its latents."""
        if self.kind is AutoencoderKind.identity:
            return 1
        return 2 ** (len(self.block_out_channels) - 1)
