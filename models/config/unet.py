"""Options of the denoiser."""

from dataclasses import dataclass, field

from models.config.choices import AttentionBackend


@dataclass(slots=True, kw_only=True)
class UNetConfig:
    """The denoiser; a level is one resolution, highest first."""

    in_channels: int = 4
    """[channels, ≥ 1, ≤ 65536] Channels of the latents and of a spatial condition beside them."""
    out_channels: int = 4
    """[channels, ≥ 1, ≤ 65536] Channels of the prediction; equals autoencoder.latent_channels."""
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """[channels, ≥ 1, ≤ 65536, 1+ values] Width of each level."""
    layers_per_block: int = 2
    """[ResBlocks, ≥ 1, ≤ 100] Blocks a level on the way down; one more on the way up."""
    attention: list[bool] = field(default_factory=lambda: [True, True, True, False])
    """[1+ values] For each level: attention after its ResBlocks. The middle block always has
    attention."""
    heads: list[int] = field(default_factory=lambda: [8, 8, 8, 8])
    """[heads, ≥ 1, ≤ 65536, 1+ values] Attention heads of each level; the middle block has those of
    the last level."""
    transformer_depth: int = 1
    """[blocks, ≥ 1, ≤ 100] Transformer blocks in each attention."""
    context_dim: int = 1024
    """[channels, ≥ 0, ≤ 65536] Width of the conditioner's tokens; 0: no conditioner, self-attention
    only."""
    add_context: bool = False
    """Add a condition of one token to the time embedding, instead of attending to it."""
    linear_projection: bool = False
    """Project into and out of transformers by linear layers (SD 2), not 1x1 convolutions (SD 1)."""
    scale_shift_norm: bool = False
    """Scale and shift normalised activations by the time embedding, instead of adding it."""
    resblock_updown: bool = False
    """Change the resolution in ResBlocks, not by convolutions."""
    norm_groups: int = 32
    """[groups, ≥ 1, ≤ 65536] Groups of channels in group normalisation."""
    attention_backend: AttentionBackend = AttentionBackend.auto
    """Implementation of attention in training; sampling, in fp32, uses sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    weights: str = ""
    """Path of weights to start from: ours, diffusers' or CompVis'; empty: train from scratch."""
    widen_input: bool = False
    """Training: begin with weights for fewer unet.in_channels; those of the new channels, the last,
    are zero. false: such weights are refused."""
