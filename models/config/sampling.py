"""Options of sampling, and the table of samplers.

Checks, sampling and exports read the table. Pages of options import no torch, so an entry names its
solver as `module:function`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config.choices import SamplerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """A scheduler of diffusers that equals one of our samplers."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Its options, without those that all schedulers share."""
    knows_pure_noise: bool = True
    """Whether it can start at a signal of 0, by its option rescale_betas_zero_snr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerEntry:
    """A sampler."""

    solver: str
    """A `models.diffusion.samplers.Solver`."""
    uses_eta: bool = False
    """Whether the solver uses sampler.eta."""
    scheduler: Scheduler | None = None
    """None: diffusers has no such scheduler, and `trainer.export` refuses this sampler."""


SAMPLERS = {
    SamplerName.ddim: SamplerEntry(
        solver="models.diffusion.samplers:ddim",
        uses_eta=True,
        scheduler=Scheduler(name="DDIMScheduler", options={"clip_sample": False}),
    ),
    SamplerName.plms: SamplerEntry(
        solver="models.diffusion.samplers:plms",
        scheduler=Scheduler(
            name="PNDMScheduler",
            options={"skip_prk_steps": True, "set_alpha_to_one": True},
            knows_pure_noise=False,
        ),
    ),
    SamplerName.euler: SamplerEntry(
        solver="models.diffusion.samplers:euler",
        scheduler=Scheduler(name="EulerDiscreteScheduler"),
    ),
    SamplerName.euler_ancestral: SamplerEntry(
        solver="models.diffusion.samplers:euler_ancestral",
        scheduler=Scheduler(name="EulerAncestralDiscreteScheduler"),
    ),
    SamplerName.heun: SamplerEntry(
        solver="models.diffusion.samplers:heun",
        scheduler=Scheduler(name="HeunDiscreteScheduler", knows_pure_noise=False),
    ),
    SamplerName.dpmpp_2m: SamplerEntry(
        solver="models.diffusion.samplers:dpmpp_2m",
        scheduler=Scheduler(
            name="DPMSolverMultistepScheduler", options={"final_sigmas_type": "zero"}
        ),
    ),
    SamplerName.unipc: SamplerEntry(
        solver="models.diffusion.samplers:unipc",
        scheduler=Scheduler(name="UniPCMultistepScheduler", options={"final_sigmas_type": "zero"}),
    ),
}


@dataclass(slots=True, kw_only=True)
class SamplerConfig:
    """The solver that draws latents, and its guidance."""

    name: SamplerName = SamplerName.ddim
    """Solver."""
    steps: int = 50
    """[sampling steps, ≥ 1, ≤ 10^6] Steps from noise to latents. A step calls the U-Net once; heun:
    twice."""
    guidance_scale: float = 7.5
    """[1, ≥ 0, ≤ 1000] Classifier-free guidance (Ho and Salimans 2022); 1: no guidance, larger:
    closer to the prompt."""
    guidance_rescale: float = 0.0
    """[share, ≥ 0, ≤ 1] Part of the contrast added by guidance that is removed (Lin et al. 2024,
    equation 16)."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[noise level, ≥ 0, ≤ 1, 2 values] Guide only at noise levels in this interval, within [0, 1]
    (Kynkäänniemi et al. 2024)."""
    eta: float = 0.0
    """[share, ≥ 0, ≤ 1] ddim: part of DDPM's fresh noise; 0: deterministic, 1: as DDPM (Song et al.
    2021, equation 16)."""
