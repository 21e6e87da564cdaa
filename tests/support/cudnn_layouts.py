"""The memory layouts of a GPU, without one: tensors of the meta device, and cuDNN's rule.

torch knows the layouts of all other operators on the meta device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
COPIES = (
    aten.clone.default,
    aten.copy_.default,
    aten._to_copy.default,
)


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


class Convolution(NamedTuple):
    """Whether the tensors of a convolution, or of its backward pass, are channels-last."""

    weight: bool
    input: bool
    grad: bool | None


class Layouts(TorchDispatchMode):
    """Lists the layouts of convolutions, and the shapes of tensors that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[Convolution] = []
        self.backward: list[Convolution] = []
        self.copies: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            x, weight = args[:2]
            self.forward.append(Convolution(channels_last(weight), channels_last(x), None))
            return _laid_out(outputs, x, weight)
        if func is aten.convolution_backward.default:
            grad, x, weight = args[:3]
            layouts = Convolution(*map(channels_last, (weight, x, grad)))
            self.backward.append(layouts)
            *tensors, bias = outputs
            return *(each if each is None else _laid_out(each, x, weight) for each in tensors), bias
        if func in COPIES and not kwargs.get("dtype"):
            self.copies.append(outputs.shape)
        return outputs


def _laid_out(values: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN writes channels-last if the input or the weight is (torch's ConvUtils.h)."""
    last = channels_last(x) or channels_last(weight)
    layout = torch.channels_last if last else torch.contiguous_format
    return values.contiguous(memory_format=layout)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """What SDPA calls on a GPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2)
