"""AdamW and its learning rate, a function of the optimizer step alone."""

import math
from collections.abc import Iterable

import torch

from trainer.config import LrSchedule, OptimConfig, TrainConfig


def learning_rate(config: OptimConfig, train: TrainConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): warm-up, then the schedule."""
    peak = config.peak_lr(train.global_batch_size)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, train.max_steps - config.warmup_steps)
    if config.schedule is LrSchedule.linear:
        return peak * (1 - done)
    if config.schedule is LrSchedule.cosine:
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak


def describe_peak(config: OptimConfig, global_batch_size: int) -> str:
    """Describe the learning rate after warm-up, and its factors if there are any."""
    peak = f"{config.peak_lr(global_batch_size):.4g}"
    if not config.scale_lr:
        return peak
    return f"{peak} = optim.lr={config.lr:g} x {global_batch_size:,} samples (optim.scale_lr)"


def build_optimizer(
    config: OptimConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019) without weight decay of tensors below rank 2.

    These are biases and the parameters of norms. The fused implementation makes one pass over
    memory, on GPUs and on CPUs, also with ZeRO's offload.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta_1, beta_2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(beta_1, beta_2),
        eps=config.eps,
        fused=True,
    )
