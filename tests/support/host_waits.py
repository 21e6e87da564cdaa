"""Counts operators for which the processor waits for a GPU, on a machine without one.

A wait is a number that is read from a tensor, a shape that depends on values, or a copy between the
processor and a GPU. A fake GPU shows copies, too; real CPU tensors show the other two.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.support.paths import ROOT

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
}
OWN = ROOT / "tests" / "support" / "host_waits.py"


class HostWaits(TorchDispatchMode):
    """Counts waits in this thread by the place in the code, `FILE:LINE`, that causes them."""

    def __init__(self) -> None:
        mode: Any = super()  # torch declares no types for its constructor
        mode.__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator."""
        packet = getattr(func, "overloadpacket", None)
        given = {one.device for one in tree_iter((args, kwargs)) if has_place(one)}
        if packet in READS or (packet is aten.index and reads_mask(args)):
            self.places[cause()] += 1
        made = func(*args, **(kwargs or {}))
        found = {one.device for one in tree_iter(made) if has_place(one)}
        if given and len({device.type for device in given | found}) > 1:
            self.places[cause()] += 1
        return made


def has_place(value: object) -> bool:
    """Whether a value lies on one device; numbers of no dimension go along with any operator."""
    return isinstance(value, Tensor) and (value.dim() > 0 or value.device.type != "cpu")


def reads_mask(args: tuple[Any, ...]) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(one, Tensor) and one.dtype in masks for one in tree_iter(args[1]))


def cause() -> str:
    """The innermost place outside of torch: of this project, or a library's name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return "deepspeed"
        if path.is_relative_to(ROOT) and path != OWN and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
