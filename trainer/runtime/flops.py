"""FLOPs of operators: multiplications and additions of matrix products.

Attention counts the same whichever kernel computes it: the scores and their product with the
values, and twice as much in the backward pass. Fast kernels compute the scores again there; that is
no work of the model (Chowdhery et al. 2022, appendix B). torch's own counter misses the CPU's
kernels and xformers', counts those scores, and takes tokens for heads in one kernel.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from trainer.runtime.operators import Args, Named, Operator, OperatorMode


class _Kernel(NamedTuple):
    """How an operator of attention is called."""

    first: int
    """Position of the queries among its arguments; keys and values follow."""
    products: int
    """Matrix products of the size of the scores."""
    tokens: int
    """Dimension of the tokens, of 4."""


FORWARD, BACKWARD = 2, 4
HEADS_FIRST, TOKENS_FIRST = 2, 1
SDPA = [
    f"aten::_scaled_dot_product_{name}"
    for name in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
    )
]
KERNELS = {
    **{name: _Kernel(0, FORWARD, HEADS_FIRST) for name in SDPA},
    **{f"{name}_backward": _Kernel(1, BACKWARD, HEADS_FIRST) for name in SDPA},
    "aten::_flash_attention_forward": _Kernel(0, FORWARD, TOKENS_FIRST),
    "aten::_flash_attention_backward": _Kernel(1, BACKWARD, TOKENS_FIRST),
    "aten::_efficient_attention_forward": _Kernel(0, FORWARD, TOKENS_FIRST),
    "aten::_efficient_attention_backward": _Kernel(1, BACKWARD, TOKENS_FIRST),
    "xformers_flash::flash_fwd": _Kernel(0, FORWARD, TOKENS_FIRST),
    "xformers_flash::flash_bwd": _Kernel(2, BACKWARD, TOKENS_FIRST),
}
"""Operators of attention by name; those of xformers exist only after its import."""


def flops_of(operator: Any, arguments: Sequence[Any], named: dict[str, Any], made: Any) -> int:
    """Return the FLOPs of a call.

    operator: an overload of torch.ops, such as aten.mm.default; arguments and named: those of the
    call; made: its result.
    """
    kernel = KERNELS.get(operator.name().partition(".")[0]) if hasattr(operator, "name") else None
    if kernel is not None:
        return _attention(kernel, arguments)
    formula = flop_registry.get(getattr(operator, "overloadpacket", None))
    return 0 if formula is None else formula(*arguments, **named, out_val=made)


def _attention(kernel: _Kernel, arguments: Sequence[Any]) -> int:
    queries, keys, values = (
        tuple(argument.shape) for argument in arguments[kernel.first : kernel.first + 3]
    )
    # q k^T is as wide as a key, and its product with the values as wide as a value
    width = (keys[-1] + values[-1]) // 2
    return 2 * kernel.products * prod(queries[:-1]) * keys[kernel.tokens] * width


class FlopCounter(OperatorMode):
    """Adds up the FLOPs of all operators that run inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @override
    def see(self, operator: Operator, args: Args, named: Named, made: Any) -> None:
        """Count the operator."""
        self.flops += flops_of(operator, args, named, made)
