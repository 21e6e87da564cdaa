"""The engine of one trained module: gradients, optimizer steps, averages, fp32 tensors by name.

Master weights, Adam's moments and the averages are read and written as full fp32 tensors by
parameter name, at every ZeRO stage and on any number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.checkpoints.reader import average_kind
from trainer.config import Config
from trainer.engine.averages import averages
from trainer.engine.optim import build_optimizer, learning_rate
from trainer.engine.weight_layout import (
    as_stored,
    as_weight,
    store_channels_last,
    wants_channels_last,
)
from trainer.engine.zero import ADAM_MOMENTS, COUNTERS, start_deepspeed
from trainer.runtime.ranks import Ranks


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of one optimizer step."""

    applied: bool
    """False if a gradient was not finite: weights, moments and averages did not change."""
    grad_norm: Tensor | float
    """Global norm of the gradients before clipping; to read a tensor is to wait for the device."""
    lr: float
    """Learning rate of the step."""


class Engine:
    """Trains one module, starting from its present weights.

    averaged: whether to keep averages of its weights. At stages 0 to 2 several modules can have an
    engine each. A loss of module A that differentiates through module B must call B itself, not B's
    engine.
    Raises: ValueError of DeepSpeed for a configuration that DeepSpeed does not accept.
    """

    def __init__(
        self, module: nn.Module, config: Config, ranks: Ranks, *, averaged: bool = True
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._averages = averages(config.ema) if averaged else ()
        self._adam_steps = 0
        self._channels_last: frozenset[str] = frozenset()
        if wants_channels_last(config, ranks.device):
            self._channels_last = store_channels_last(module)
        optimizer = build_optimizer(config.optim, module.parameters())
        self._engine, self._storage = start_deepspeed(module, optimizer, config, ranks)
        self._names = {
            name: parameter
            for name, parameter in self._engine.module.named_parameters()
            if parameter.requires_grad
        }
        self._create_state()

    @property
    def model(self) -> nn.Module:
        """The module to call in training; at stage 3 it gathers the weights of each layer."""
        return self._engine

    @property
    def module(self) -> nn.Module:
        """The trained module, in the precision of the forward pass."""
        return self._engine.module

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages of the weights; metrics and samples come from the first."""
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
        """Differentiate the loss of a micro batch without an update; collective.

        loss: maps the module to a scalar. The gradients are computed and reduced like those of a
        step, but they are NaN, so every rank skips the update.
        """
        engine = self._engine
        counters = {name: getattr(engine, name) for name in COUNTERS}
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss(self.model) * float("nan"))
        if self._storage.clips_itself:
            engine.step()
        else:
            engine.zero_grad()
        engine.set_gradient_accumulation_boundary(None)
        for name, value in counters.items():
            setattr(engine, name, value)

    def step(self, step: int) -> StepResult:
        """Take optimizer step `step` (from 0), after the backward passes; collective."""
        lr = learning_rate(self._config.optim, self._config.train, step)
        for group in self._storage.inner.param_groups:
            group["lr"] = lr
        norm = None if self._storage.clips_itself else self._plain_grad_norm()
        if norm is not None and not torch.isfinite(norm):
            self._engine.optimizer.zero_grad()
            self._engine.micro_steps += 1  # DeepSpeed counts batches that it skips, too
            return StepResult(False, norm, lr)
        if norm is not None and self._config.optim.max_grad_norm:
            # DeepSpeed would compute the norm a second time
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
        return StepResult(applied, float("nan") if norm is None else norm, lr)

    def tensors(self, kinds: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, parameter name, copy of the full fp32 tensor) for these kinds.

        Collective; the order is the same on every rank.
        """
        for name in self._names:
            for kind in kinds:
                yield kind, name, self._full(name, kind)

    def num_bytes(self, kinds: Sequence[str]) -> int:
        """Return the size of all tensors of these kinds, over all ranks, in bytes."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self._names.values())
        return 4 * len(kinds) * sum(sizes)

    def ema_weights(self, average: str) -> dict[str, Tensor]:
        """Return an average's weights and the module's buffers: a state dict of full fp32 tensors.

        average: one of `averages`. Collective; every rank gets the whole dict.
        """
        kind = average_kind(average)
        averaged = {name: self._full(name, kind) for name in self._names}
        buffers = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        return averaged | buffers

    def load(self, read: Callable[[str, str], Tensor], adam_steps: int) -> None:
        """Load the tensors of all `kinds`; read: maps (kind, parameter name) to the full tensor.

        Raises: ValueError for a tensor of another shape than its parameter's.
        """
        for name, parameter in self._names.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 keeps partitions
            if stored := name in self._channels_last:
                shape = as_weight(torch.empty(shape, device="meta")).shape
            for kind in self.kinds:
                value = read(kind, name)
                if value.shape != shape:  # DeepSpeed's setters would cut or pad it
                    raise ValueError(f"{kind}/{name} is {list(value.shape)}, not {list(shape)}")
                value = as_stored(value) if stored else value
                self._storage.put(parameter, kind, value.to(self._ranks.device))
        self._adam_steps = adam_steps
        for flat in self._storage.flats():
            self._storage.inner.state[flat]["step"].fill_(adam_steps)
        self._storage.use_masters()

    def adam_steps(self) -> int:
        """Return the number of applied updates, for Adam's bias correction and the averages."""
        return self._adam_steps

    def _full(self, name: str, kind: str) -> Tensor:
        """Return a copy of a parameter's full fp32 tensor, in the order of the network's weight."""
        full = self._storage.full(self._names[name], kind)
        return as_weight(full).contiguous() if name in self._channels_last else full

    @property
    def _state_keys(self) -> tuple[str, ...]:
        return (*ADAM_MOMENTS, *(average_kind(name) for name in self.averages))

    def _create_state(self) -> None:
        """Create Adam's state: a save or load before the first step needs it."""
        for flat in self._storage.flats():
            self._storage.inner.state[flat] = {
                # fused AdamW needs `step` on the parameter's device
                "step": torch.zeros((), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in ADAM_MOMENTS},
                **{average_kind(name): flat.detach().clone() for name in self.averages},
            }
        self._storage.link_state()

    def _update_averages(self) -> None:
        """Update the averages of this rank's own fp32 partitions; no communication."""
        flats = self._storage.flats()
        weights = [flat.detach() for flat in flats]
        for average in self._averages:
            key = average_kind(average.name)
            means = [self._storage.inner.state[flat][key] for flat in flats]
            torch.ops.aten._foreach_lerp_(means, weights, average.weight(self._adam_steps))

    def _plain_grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)
