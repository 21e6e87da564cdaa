"""One real training step on fake tensors: what it computes and what it keeps, without doing it.

Fake tensors (torch.FakeTensorMode) have shapes and storage sizes, and no data. The code that runs
on them is the training's own: the network, the task's loss, autograd. Memory is not derived from a
formula; the storages that are alive are counted at every operator.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, slots=True)
class Stretch:
    """From one weight's gradient to the next one's; the first has the forward pass, too."""

    peak_bytes: int
    """Most activations alive at once in it, transients included."""
    left_bytes: int
    """Activations alive at its end."""
    elements: int
    """Of the gradient that ends it; 0 after the last one."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Forward and backward pass of one micro batch.

    Activations are all that is alive beside weights and their gradients.
    """

    micro_batch: int
    flops: int
    """Multiplications and additions of products, recomputation included."""
    stretches: tuple[Stretch, ...]

    @property
    def peak_bytes(self) -> int:
        """Most activations alive at once."""
        return max(stretch.peak_bytes for stretch in self.stretches)


def fake_mode() -> FakeTensorMode:
    """CPU tensors without data: those of a GPU need one for the backward pass."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_module(
    build: Callable[[], nn.Module], dtype: torch.dtype, mode: FakeTensorMode
) -> nn.Module:
    """The module without data, its weights in the forward pass's precision."""
    with torch.device("meta"):
        module = build().to(dtype)
    with mode:
        return module.to_empty(device="cpu").train()


def trace(module: nn.Module, loss: Callable[[], Tensor], micro_batch: int) -> Trace:
    """Run loss() and its backward pass; within fake mode.

    loss: a scalar of a micro batch of this size, which it makes itself.
    """
    alive = LiveBytes(module)
    stretches: list[Stretch] = []

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        alive.set_apart(parameter.grad)
        stretches.append(alive.stretch(parameter.numel()))

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]
    with alive:
        loss().backward()
    for hook in hooks:
        hook.remove()
    module.zero_grad()
    return Trace(micro_batch, alive.flops, (*stretches, alive.stretch(0)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages while operators make and forget them, and their products.

    FlopCounterMode's own hooks on modules would keep activations alive.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: what its weights and buffers take is not counted."""
        super().__init__()
        self._known = {_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._peak_bytes = 0
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and count what it made."""
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def set_apart(self, tensor: Tensor) -> None:
        """From now on this one is not counted."""
        self._bytes -= self._sizes.pop(_key(tensor), 0)

    def stretch(self, elements: int) -> Stretch:
        """What there was since the last one."""
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


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
