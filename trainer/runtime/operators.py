"""See every operator that runs."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Operator = Callable[..., Any]
Args = tuple[Any, ...]
Named = dict[str, Any]


class OperatorMode(TorchDispatchMode):
    """Shows each operator that runs inside of it to `see`."""

    def __init__(self) -> None:
        mode: Any = super()  # torch declares no types for its constructor
        mode.__init__()

    def see(self, operator: Operator, args: Args, named: Named, made: Any) -> None:
        """Look at an operator, its arguments by place and by name, and its result."""
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, and show it."""
        made = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, made)
        return made
