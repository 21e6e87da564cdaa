"""Memory layout of convolutions' weights: cuDNN reads channels-last ones without a copy.

DeepSpeed keeps the weights as views of flat buffers in the order of their indices, so it would undo
`module.to(memory_format=torch.channels_last)`. Therefore a weight [O, I, kh, kw] is stored as a
parameter [O, kh, kw, I], and the convolution takes a view of it. Its gradient, fp32 weight, moments
and averages have the same order; `Engine` turns them around where it reads or writes them by name.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from trainer.config import Config, Task


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose weight is stored as [O, kh, kw, I]."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """input: [B, I, h, w] → [B, O, h', w']."""
        return self._conv_forward(input, as_weight(self.weight), self.bias)


def wants_channels_last(config: Config, device: torch.device) -> bool:
    """Whether a run stores weights so: on a GPU, with train.channels_last, for a denoiser.

    Curves on CPUs do not depend on train.channels_last by more than its convolutions. The
    adversarial loss of a first stage reads a weight by its shape.
    """
    return config.train.channels_last and device.type == "cuda" and config.task is Task.diffusion


def store_channels_last(module: nn.Module) -> frozenset[str]:
    """Store the weights of a module's convolutions so; return their parameter names.

    A 1x1 kernel has the same order in both layouts, and stays.
    """
    names: set[str] = set()
    untyped: Any = module
    for name, layer in untyped.named_modules():
        if type(layer) is nn.Conv2d and layer.kernel_size != (1, 1):
            layer.weight.data = as_stored(layer.weight.data)
            layer.__class__ = ChannelsLastConv2d
            names.add(f"{name}.weight".removeprefix("."))
    return frozenset(names)


def as_stored(weight: Tensor) -> Tensor:
    """Copy a weight [O, I, kh, kw] → [O, kh, kw, I], contiguous."""
    return weight.permute(0, 2, 3, 1).contiguous()


def as_weight(stored: Tensor) -> Tensor:
    """View a stored weight [O, kh, kw, I] → [O, I, kh, kw], channels-last."""
    return stored.permute(0, 3, 1, 2)
