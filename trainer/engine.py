"""DeepSpeed behind one small class: the only module that imports it or knows its insides.

Master weights, Adam's moments and the EMA are read and written as full fp32 tensors by parameter
name, whatever the ZeRO stage and the number of ranks. Beyond DeepSpeed's public functions this
relies on `basic_optimizer`, `fp32_partitioned_groups_flat`, and the two names that link optimizer
state to parameters at stages 1 and 2.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checks import grad_accum_steps
from trainer.config import Config, Precision
from trainer.distributed import Ranks
from trainer.optim import build_optimizer, learning_rate

# DeepSpeed guesses its accelerator when it is imported, and warns where that is no GPU
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"

import deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

logger.setLevel(logging.ERROR)

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
"""What the optimizer state holds for each parameter, beside its fp32 master weight."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    applied: bool
    """False where a gradient was not finite: weights, moments and EMA stay as they were."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float


class Engine:
    """Trains a module whose weights are already those to start from.

    Raises: ValueError of deepspeed for a configuration that it does not accept.
    """

    def __init__(self, module: nn.Module, config: Config, ranks: Ranks) -> None:
        if ranks.device.type == "cpu":
            # gloo's reductions do; this op would be compiled for minutes on first use
            __compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "gloo" if ranks.device.type == "cpu" else "nccl", auto_mpi_discovery=False
        )
        self._config = config
        self._ranks = ranks
        self._stage = config.deepspeed.stage
        initialised: tuple[Any, ...] = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(config.optim, module.parameters()),
            config=deepspeed_config(config, ranks.world_size),
            dist_init_required=False,
        )
        self._engine, self._optimizer, *_ = initialised
        self._inner: torch.optim.Optimizer = (
            self._optimizer if self._stage == 0 else self._engine.basic_optimizer
        )
        self._names = {
            name: parameter
            for name, parameter in self._engine.module.named_parameters()
            if parameter.requires_grad
        }
        self._create_state()

    @property
    def model(self) -> nn.Module:
        """The module to call in training: at stage 3 it gathers its weights as they are needed."""
        return self._engine

    @property
    def module(self) -> nn.Module:
        """The trained module, in the precision of the forward pass."""
        return self._engine.module

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro batch's mean loss."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, step: int) -> StepResult:
        """Take optimizer step `step` (from 0) with the gradients of its last micro batch."""
        lr = learning_rate(self._config.optim, step, self._config.train.max_steps)
        for group in self._inner.param_groups:
            group["lr"] = lr
        norm = self._plain_grad_norm() if self._stage == 0 else None
        if norm is not None and not torch.isfinite(norm):
            self._engine.optimizer.zero_grad()
            self._engine.micro_steps += 1  # this batch is over, though it changed nothing
            return StepResult(False, float(norm), lr)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        if applied:
            self._update_ema(step)
        return StepResult(applied, float(norm if norm is not None else "nan"), lr)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter name, full fp32 tensor); collective, in the same order everywhere.

        Kinds are `weight` and STATE_KEYS.
        """
        for name, parameter in self._names.items():
            yield "weight", name, self._full(parameter, None)
            for key in STATE_KEYS:
                yield key, name, self._full(parameter, key)

    def ema_weights(self) -> dict[str, Tensor]:
        """The averaged weights with the module's buffers, as a state dict on every rank."""
        averaged = {name: self._full(p, "ema").clone() for name, p in self._names.items()}
        buffers = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        return averaged | buffers

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], adam_steps: int) -> None:
        """Put back what `tensors` gave: {kind: {name: full tensor}}."""
        for name, parameter in self._names.items():
            for kind in ("weight", *STATE_KEYS):
                self._put(parameter, None if kind == "weight" else kind, tensors[kind][name])
        for flat in self._flats():
            self._inner.state[flat]["step"].fill_(adam_steps)

    def adam_steps(self) -> int:
        """Updates that Adam's bias correction has counted."""
        return int(self._inner.state[self._flats()[0]]["step"].item())

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the inner optimizer steps: parameters or partitions of them."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _create_state(self) -> None:
        """Adam creates its state at the first step; saving and loading need it before."""
        for flat in self._flats():
            self._inner.state[flat] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
                "ema": flat.detach().clone(),
            }
        if self._stage in (1, 2):
            # with several parameter groups only the first is linked by DeepSpeed itself
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _update_ema(self, step: int) -> None:
        """Average this rank's own fp32 partitions: no communication."""
        decay = min(self._config.ema.decay, (1 + step) / (10 + step))
        flats = [flat.detach() for flat in self._flats()]
        averages = [self._inner.state[flat]["ema"] for flat in self._flats()]
        for average, flat in zip(averages, flats, strict=True):
            average.lerp_(flat, 1 - decay)

    def _plain_grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        if self._stage == 0:
            tensor = parameter.detach() if key is None else self._inner.state[parameter][key]
            return tensor.float()
        full = (
            safe_get_full_fp32_param(parameter)
            if key is None
            else safe_get_full_optimizer_state(parameter, key)
        )
        assert full is not None, "DeepSpeed did not link this parameter to its state"
        return full

    def _put(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        value = value.to(self._ranks.device)
        if self._stage == 0:
            target = parameter.data if key is None else self._inner.state[parameter][key]
            target.copy_(value)
        elif self._stage == 3:
            # the full setters fail where the size does not divide by the world size
            share = -(-value.numel() // self._ranks.world_size)
            padded = value.new_zeros(share * self._ranks.world_size)
            padded[: value.numel()] = value.flatten()
            local = padded[self._ranks.rank * share :][:share]
            if key is None:
                safe_set_local_fp32_param(parameter, local)
            else:
                safe_set_local_optimizer_state(parameter, local, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def deepspeed_config(config: Config, world_size: int) -> dict[str, object]:
    """What `deepspeed.initialize` is told."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps(config, world_size),
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {"stage": config.deepspeed.stage},
        "bf16": {"enabled": config.train.precision is Precision.bf16},
        "steps_per_print": 2**62,
    }
