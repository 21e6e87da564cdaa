"""DeepSpeed: its start, and access to fp32 weights and optimizer state at each ZeRO stage.

No other file imports DeepSpeed. This module uses DeepSpeed's public functions and these internals:
`basic_optimizer`, `fp32_partitioned_groups_flat`, the counters, and the two attributes that link
optimizer state to parameters at stages 1 and 2; to update the weights of the forward pass,
`update_lp_params` at these stages, and `_reassign_or_swap_out_partitioned_parameters` and
`persistent_parameters` at stage 3.
"""

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from trainer.checks import grad_accum_steps
from trainer.config import Config, Precision
from trainer.engine.buckets import gradient_buckets
from trainer.runtime.ranks import Ranks

# DeepSpeed chooses its accelerator when it is imported, and warns if that is no GPU
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"

import deepspeed

library: Any = deepspeed  # without type stubs
utils: Any = deepspeed.utils

utils.logger.setLevel(logging.ERROR)
# the deprecated calls are DeepSpeed's own, and every rank would warn
warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
"""Attributes of DeepSpeed's engine that count steps and samples."""
FRAGMENT = "_hp_mapping"
"""Attribute of a parameter with the place of its fp32 state, at stages 1 and 2."""
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of the moments in Adam's state of a parameter."""


def start_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, ranks: Ranks
) -> tuple[Any, "Storage"]:
    """Wrap a module and its optimizer; return DeepSpeed's engine and the storage of its stage.

    Raises: ValueError of DeepSpeed for a configuration that DeepSpeed does not accept.
    """
    if ranks.device.type == "cpu":
        # DeepSpeed would compile this operator for minutes at its first use; gloo is enough
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if ranks.device.type == "cpu" else "nccl"
    library.init_distributed(backend, auto_mpi_discovery=False)
    engine, zero_optimizer, *_ = library.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config(config, ranks.world_size, _trained_parameters(module)),
        dist_init_required=False,
    )
    storage = (Replicated, PartitionedState, PartitionedState, PartitionedWeights)[
        config.deepspeed.stage
    ]
    return engine, storage(engine, zero_optimizer, ranks)


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, object]:
    """Return DeepSpeed's configuration; parameters: number of trained parameters."""
    stage, offload = config.deepspeed.stage, config.deepspeed.offload_optimizer
    buckets = gradient_buckets(parameters, stage=stage, ranks=world_size, offload=offload)
    zero: dict[str, object] = {
        "stage": stage,
        "reduce_bucket_size": buckets.elements,
        "overlap_comm": buckets.overlaps,
    }
    if offload:
        pin = torch.cuda.is_available()
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps(config, world_size),
        # Engine.step clips at stage 0
        "gradient_clipping": config.optim.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        # keep torch's fused AdamW: DeepSpeed would compile its own at the first use
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision is Precision.bf16},
        "steps_per_print": 2**62,
    }


def _trained_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Storage(ABC):
    """Access to the fp32 weights and the optimizer state at one ZeRO stage."""

    inner: torch.optim.Optimizer
    """The optimizer that updates `flats`."""
    clips_itself = True
    """Whether DeepSpeed's optimizer computes the gradient norm and clips."""

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """Return the fp32 tensors that `inner` updates: parameters or this rank's partitions."""

    @abstractmethod
    def full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Return a copy of the full fp32 tensor of one of Engine.kinds; collective."""

    @abstractmethod
    def put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set the tensor that `full` copies; value: full fp32 tensor on the rank's device."""

    @abstractmethod
    def use_masters(self) -> None:
        """Copy the fp32 master weights to the weights of the forward pass; collective."""

    @abstractmethod
    def link_state(self) -> None:
        """Make new entries in the state of `inner` known to DeepSpeed."""


class Setters(NamedTuple):
    """DeepSpeed's setters of a parameter's fp32 weight and of its optimizer state."""

    set_weight: Callable[[nn.Parameter, Tensor], None]
    set_state: Callable[[nn.Parameter, Tensor, str], None]

    def put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set the tensor of one of Engine.kinds."""
        if kind == "weight":
            self.set_weight(parameter, value)
        else:
            self.set_state(parameter, value, kind)


FULL = Setters(utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state)
LOCAL = Setters(utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state)
"""Setters of this rank's share."""


class Replicated(Storage):
    """Stage 0: every rank keeps everything in fp32, so weights and master weights are the same."""

    clips_itself = False

    def __init__(self, engine: Any, optimizer: Any, ranks: Ranks) -> None:
        self.inner = optimizer
        if ranks.world_size == 1:
            # one rank reduces nothing, but DeepSpeed would copy gradients into a buffer and back
            engine.enable_backward_allreduce = False

    @override
    def flats(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    @override
    def full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return self._tensor(parameter, kind).detach().clone()

    @override
    def put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self._tensor(parameter, kind).copy_(value)

    @override
    def use_masters(self) -> None:
        """Do nothing: the forward pass uses the master weights."""

    @override
    def link_state(self) -> None:
        """Do nothing: `full` reads the state of `inner` directly."""

    def _tensor(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return parameter.data if kind == "weight" else self.inner.state[parameter][kind]


class PartitionedState(Storage):
    """Stages 1 and 2: each rank has one partition of the master weights and optimizer state."""

    def __init__(self, engine: Any, optimizer: Any, ranks: Ranks) -> None:
        self.inner = engine.basic_optimizer
        self._optimizer = optimizer
        self._alone = ranks.world_size == 1

    @override
    def flats(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    @override
    def full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if not self._alone:
            return _full(parameter, kind)
        # DeepSpeed's getters would fill a buffer of zeros and reduce it over this one rank
        key = None if kind == "weight" else kind
        fragment: Tensor = getattr(parameter, FRAGMENT).get_hp_fragment(key)
        return fragment.detach().clone().view(parameter.shape)

    @override
    def put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        FULL.put(parameter, kind, value)

    @override
    def use_masters(self) -> None:
        self._optimizer.update_lp_params()

    @override
    def link_state(self) -> None:
        # DeepSpeed links only the first parameter group
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


class PartitionedWeights(Storage):
    """Stage 3: each rank has one partition of weights, master weights and optimizer state."""

    def __init__(self, engine: Any, optimizer: Any, ranks: Ranks) -> None:
        self.inner = engine.basic_optimizer
        self._optimizer = optimizer
        self._ranks = ranks

    @override
    def flats(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    @override
    def full(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return _full(parameter, kind)

    @override
    def use_masters(self) -> None:
        optimizer = self._optimizer
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small parameters; every rank keeps them whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @override
    def put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        # FULL fails if the size is not a multiple of the world size
        share = -(-value.numel() // self._ranks.world_size)
        padded = value.new_zeros(share * self._ranks.world_size)
        padded[: value.numel()] = value.flatten()
        local = padded[self._ranks.rank * share :][:share]
        LOCAL.put(parameter, kind, local)

    @override
    def link_state(self) -> None:
        """Do nothing: DeepSpeed reads the state of a partition from `inner`."""


def _full(parameter: nn.Parameter, kind: str) -> Tensor:
    full: Tensor | None = (
        utils.safe_get_full_fp32_param(parameter)
        if kind == "weight"
        else utils.safe_get_full_optimizer_state(parameter, kind)
    )
    assert full is not None, "DeepSpeed did not link this parameter to its state"
    return full
