"""AdamW and its learning rate, a function of the optimizer step alone."""

import math
from collections.abc import Iterable

import torch

from trainer.config import LrSchedule, OptimConfig


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule is LrSchedule.linear:
        return config.lr * (1 - done)
    if config.schedule is LrSchedule.cosine:
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr


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
