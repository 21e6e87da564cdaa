"""Trace a training step on fake tensors: count its FLOPs and its memory.

Fake tensors (torch.FakeTensorMode) have shapes and storage sizes, and no data. The training's own
code runs on them: the network, the task's loss, autograd. Memory does not come from a formula: the
live storages are counted at every operator.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

from trainer.runtime.flops import flops_of
from trainer.runtime.operators import Args, Named, Operator, OperatorMode


@dataclass(frozen=True, slots=True)
class Stretch:
    """The operators between two gradients of weights; the first has the forward pass, too."""

    peak_bytes: int
    """Peak of live activations, with temporary tensors."""
    left_bytes: int
    """Live activations at the end of the stretch."""
    elements: int
    """Elements of the gradient that ends the stretch; 0 for the last stretch."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Forward and backward pass of one micro batch.

    Activations are all live tensors except weights and their gradients.
    """

    micro_batch: int
    flops: int
    """Multiplications and additions of matrix products, with recomputation."""
    operators: int
    """Operators that compute or copy: those which a GPU launches."""
    stretches: tuple[Stretch, ...]

    @property
    def peak_bytes(self) -> int:
        """Peak of live activations."""
        return max(stretch.peak_bytes for stretch in self.stretches)


def fake_mode() -> FakeTensorMode:
    """Make a mode for fake tensors on the CPU; on fake GPU tensors, backward passes need a GPU."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(
    build: Callable[[], nn.Module], dtype: torch.dtype, mode: FakeTensorMode
) -> nn.Module:
    """Build a module of fake tensors; dtype: precision of the forward pass."""
    with torch.device("meta"):
        module = build().to(dtype)
    with mode:
        return module.to_empty(device="cpu").train()


def trace(module: nn.Module, loss: Callable[[], Tensor], micro_batch: int) -> Trace:
    """Trace a forward and backward pass; call it within fake mode.

    loss: makes a micro batch of this size and returns its scalar loss.
    """
    alive = LiveBytes(module)
    stretches: list[Stretch] = []

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        alive.set_apart(parameter.grad)
        stretches.append(alive.stretch(parameter.numel()))

    # of type Any: torch declares no types for hooks of parameters
    trained: list[Any] = [one for one in module.parameters() if one.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]
    with alive:
        torch.autograd.backward(loss())
    for hook in hooks:
        hook.remove()
    module.zero_grad()
    return Trace(micro_batch, alive.flops, alive.operators, (*stretches, alive.stretch(0)))


class LiveBytes(OperatorMode):
    """Counts the bytes of live storages at every operator, and the FLOPs of matrix products."""

    def __init__(self, module: nn.Module) -> None:
        """module: its weights and buffers are not counted."""
        super().__init__()
        self._known = {_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._peak_bytes = 0
        self.flops = 0
        self.operators = 0

    @override
    def see(self, operator: Operator, args: Args, named: Named, made: Any) -> None:
        """Count the operator and its results."""
        self.flops += flops_of(operator, args, named, made)
        self.operators += _launches(operator)
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)

    def set_apart(self, tensor: Tensor) -> None:
        """Stop counting this tensor."""
        self._bytes -= self._sizes.pop(_key(tensor), 0)

    def stretch(self, elements: int) -> Stretch:
        """End the current stretch, and return it.

        elements: of the gradient that ends it.
        """
        ended = Stretch(self._peak_bytes, self._bytes, elements)
        self._peak_bytes = self._bytes
        return ended

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        storage = tensor.untyped_storage()
        self._known.add(key)
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self._bytes += storage.nbytes()
        self._peak_bytes = max(self._peak_bytes, self._bytes)

    def _forget(self, key: int) -> None:
        self._known.discard(key)
        self._bytes -= self._sizes.pop(key, 0)


def _launches(func: Any) -> bool:
    """Return whether the operator computes or copies; views, allocations and questions do not."""
    return func.namespace == "aten" and not func.is_view and not func.__name__.startswith("empty")


def _key(tensor: Tensor) -> int:
    """Return the address of the storage, which fake tensors have, too."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata
