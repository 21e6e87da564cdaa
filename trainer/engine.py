"""DeepSpeed behind one small class: the only module that imports it or knows its insides.

Master weights, Adam's moments and the EMA are read and written as full fp32 tensors by parameter
name, whatever the ZeRO stage and the number of ranks. Beyond DeepSpeed's public functions this
relies on `basic_optimizer`, `fp32_partitioned_groups_flat`, its counters, the two names that link
optimizer state to parameters at stages 1 and 2, and those by which a step ends: `update_lp_params`
there, `_reassign_or_swap_out_partitioned_parameters` and `persistent_parameters` at stage 3.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.averages import average_kind, averages
from trainer.buckets import bucket_elements
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
# DeepSpeed's own calls, which every rank would report
warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
"""What DeepSpeed counts of its own."""
FRAGMENT = "_hp_mapping"
"""DeepSpeed's attribute of a parameter that leads to its fp32 state, at stages 1 and 2."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam's state holds for each parameter."""


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

    averaged: whether its weights are. Several modules have an engine each, at stages 0 to 2; one
    that another's loss runs through is called as the plain module there.
    Raises: ValueError of deepspeed for a configuration that it does not accept.
    """

    def __init__(
        self, module: nn.Module, config: Config, ranks: Ranks, *, averaged: bool = True
    ) -> None:
        if ranks.device.type == "cpu":
            # gloo's reductions do; this op would be compiled for minutes on first use
            __compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "gloo" if ranks.device.type == "cpu" else "nccl", auto_mpi_discovery=False
        )
        self._config = config
        self._ranks = ranks
        self._stage = config.deepspeed.stage
        self._averages = averages(config.ema) if averaged else ()
        self._adam_steps = 0
        initialised: tuple[Any, ...] = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(config.optim, module.parameters()),
            config=deepspeed_config(config, ranks.world_size, _trained_elements(module)),
            dist_init_required=False,
        )
        self._engine, self._optimizer, *_ = initialised
        if self._stage == 0 and ranks.world_size == 1:
            # there is nothing to reduce, but all gradients would be copied into a buffer and back
            self._engine.enable_backward_allreduce = False
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

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages of the weights; the first is the one to show."""
        return tuple(average.name for average in self._averages)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of `tensors`: master weights, Adam's moments and the averages."""
        return ("weight", *self._state_keys)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro batch's mean loss."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def rehearse(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Differentiate the loss of a micro batch, and change nothing.

        loss: computes it with the module that it is given. Its gradients are made and reduced as
        in a step, but are NaN, so that the update is skipped on every rank.
        """
        engine = self._engine
        counters = {name: getattr(engine, name) for name in COUNTERS}
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss(self.model) * float("nan"))
        if self._stage == 0:
            engine.zero_grad()
        else:
            engine.step()
        engine.set_gradient_accumulation_boundary(None)
        for name, value in counters.items():
            setattr(engine, name, value)

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
        if norm is not None and self._config.optim.max_grad_norm:
            # not left to DeepSpeed, which would take the norm a second time
            nn.utils.clip_grads_with_norm_(
                self._names.values(), self._config.optim.max_grad_norm, norm
            )
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        if applied:
            self._adam_steps += 1
            self._update_averages()
        return StepResult(applied, float(norm if norm is not None else "nan"), lr)

    def tensors(self, kinds: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter name, copy of the full fp32 tensor) of some of `kinds`.

        Collective, in one order everywhere.
        """
        for name, parameter in self._names.items():
            for kind in kinds:
                yield kind, name, self._full(parameter, kind)

    def num_bytes(self, kinds: Sequence[str]) -> int:
        """Of all that `tensors` yields, over all ranks."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self._names.values())
        return 4 * len(kinds) * sum(sizes)

    def ema_weights(self, average: str) -> dict[str, Tensor]:
        """The weights averaged as one of `averages`, with the module's buffers, as a state dict.

        Collective; every rank has the whole.
        """
        kind = average_kind(average)
        averaged = {name: self._full(p, kind) for name, p in self._names.items()}
        buffers = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        return averaged | buffers

    def load(self, read: Callable[[str, str], Tensor], adam_steps: int) -> None:
        """Put back what `tensors` gave; read: (kind, parameter name) → full tensor."""
        for name, parameter in self._names.items():
            for kind in self.kinds:
                self._put(parameter, kind, read(kind, name))
        self._adam_steps = adam_steps
        for flat in self._flats():
            self._inner.state[flat]["step"].fill_(adam_steps)
        self._use_masters()

    def adam_steps(self) -> int:
        """Updates that were applied, as Adam's bias correction and the averages count them."""
        return self._adam_steps

    @property
    def _state_keys(self) -> tuple[str, ...]:
        return (*MOMENTS, *(average_kind(name) for name in self.averages))

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the inner optimizer steps: parameters or partitions of them."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _use_masters(self) -> None:
        """Give the weights of the forward pass the values of the fp32 masters; collective."""
        optimizer = self._optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:  # small ones, which every rank keeps whole
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _create_state(self) -> None:
        """Adam creates its state at the first step; saving and loading need it before."""
        for flat in self._flats():
            self._inner.state[flat] = {
                "step": torch.zeros((), device=flat.device),  # there, as it is fused
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
                **{average_kind(name): flat.detach().clone() for name in self.averages},
            }
        if self._stage in (1, 2):
            # with several parameter groups only the first is linked by DeepSpeed itself
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _update_averages(self) -> None:
        """Average this rank's own fp32 partitions: no communication."""
        flats = self._flats()
        weights = [flat.detach() for flat in flats]
        for average in self._averages:
            key = average_kind(average.name)
            means = [self._inner.state[flat][key] for flat in flats]
            torch.ops.aten._foreach_lerp_(means, weights, average.weight(self._adam_steps))

    def _plain_grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._stage == 0:
            tensor = parameter if kind == "weight" else self._inner.state[parameter][kind]
            return tensor.detach().clone()
        if self._stage < 3 and self._ranks.world_size == 1:
            # what the getters give, without a buffer of zeros and a reduction over one rank
            fragment = getattr(parameter, FRAGMENT).get_hp_fragment(
                None if kind == "weight" else kind
            )
            return fragment.detach().clone().view(parameter.shape)
        full = (
            safe_get_full_fp32_param(parameter)
            if kind == "weight"
            else safe_get_full_optimizer_state(parameter, kind)
        )
        assert full is not None, "DeepSpeed did not link this parameter to its state"
        return full

    def _put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        value = value.to(self._ranks.device)
        if self._stage == 0:
            target = parameter.data if kind == "weight" else self._inner.state[parameter][kind]
            target.copy_(value)
        elif self._stage == 3:
            # the full setters fail where the size does not divide by the world size
            share = -(-value.numel() // self._ranks.world_size)
            padded = value.new_zeros(share * self._ranks.world_size)
            padded[: value.numel()] = value.flatten()
            local = padded[self._ranks.rank * share :][:share]
            if kind == "weight":
                safe_set_local_fp32_param(parameter, local)
            else:
                safe_set_local_optimizer_state(parameter, local, kind)
        elif kind == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, object]:
    """What `deepspeed.initialize` is told; parameters: trained elements of the module."""
    zero: dict[str, object] = {
        "stage": config.deepspeed.stage,
        "reduce_bucket_size": bucket_elements(parameters),
    }
    if config.deepspeed.offload_optimizer:
        pin = torch.cuda.is_available()
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps(config, world_size),
        # at stage 0 Engine.step does it
        "gradient_clipping": config.optim.max_grad_norm if config.deepspeed.stage else 0.0,
        "zero_optimization": zero,
        # DeepSpeed's own CPU Adam is compiled on first use; torch's fused one is there
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision is Precision.bf16},
        "steps_per_print": 2**62,
    }


def _trained_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
