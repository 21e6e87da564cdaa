"""AdamW and its learning rate, a function of the optimizer step alone."""

import math
from collections.abc import Iterable

import torch

from trainer.config import LrSchedule, OptimConfig


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to 0."""
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
    """AdamW; weight decay spares biases, norms and embeddings' vectors (tensors below rank 2).

    Fused: one pass over memory an update, on GPUs and CPUs, and so under ZeRO's offload, too.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        fused=True,
    )
