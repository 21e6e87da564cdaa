"""Backends of scaled dot-product attention (Vaswani et al. 2017, equation 1).

Each network has its own backend (`models.layers.blocks.use_attention`).

Shapes in this file: B batch, N queries, M keys, H heads, D width of a head.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import AttentionBackend

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [B, N, H, D], k and v [B, M, H, D], mask) → softmax(q kᵀ / √D) v, [B, N, H, D].

mask: [B, M] bool, false for keys that attention skips; at least one key of each sample is true.
None: no key is skipped.
"""
CPU_HEAD_DIM = 16
"""Narrowest head for which the CPU's matrix products are fast."""
CUDA_RUNTIME, CUDA_LIBRARY = "nvidia-cuda-runtime-cu12", "libcudart.so.12"
"""Package and file of the CUDA runtime that xformers was built for."""
XFORMERS_ALIGNMENT = 8
"""xformers' kernels need rows of a bias that begin at multiples of this many values."""


class AttentionShape(NamedTuple):
    """Sizes of the inputs of a `Backend`."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    masked: bool = False


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention by the paper's equation; tests compare the fast backends with it."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention by torch's scaled_dot_product_attention (SDPA)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, _of_all_queries(mask)).transpose(1, 2)


def padded_sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute SDPA with narrow heads padded by zeros: up to twice as fast on a CPU."""
    width = q.shape[-1]
    if width >= CPU_HEAD_DIM:
        return sdpa_attention(q, k, v, mask)
    q, k, v = (F.pad(x, (0, CPU_HEAD_DIM - width)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, _of_all_queries(mask), scale=width**-0.5)
    return mixed.transpose(1, 2)[..., :width]


def _of_all_queries(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention by xformers' memory-efficient kernels."""
    bias = None if mask is None else xformers_bias(q, mask)
    return xformers_ops().memory_efficient_attention(q, k, v, bias)


@cache
def xformers_ops() -> Any:
    """Import xformers.ops, after the CUDA runtime that its kernels were built for.

    Its wheel needs libcudart.so.12, and torch brings a newer one. Without it, xformers refuses all
    input.
    """
    with suppress(PackageNotFoundError, OSError):
        for file in distribution(CUDA_RUNTIME).files or ():
            if file.name == CUDA_LIBRARY:
                ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)
    import xformers.ops

    return xformers.ops


def xformers_bias(q: Tensor, mask: Tensor) -> Tensor:
    """Return the mask as a bias on the scores, 0 or −inf: [B, M] expanded to [B, H, N, M]."""
    batch, queries, heads, _ = q.shape
    keys = mask.shape[1]
    whole = -(-keys // XFORMERS_ALIGNMENT) * XFORMERS_ALIGNMENT
    bias = torch.zeros((batch, whole), dtype=q.dtype, device=q.device)[:, :keys]
    bias.masked_fill_(~mask, -torch.inf)
    return bias[:, None, None].expand(-1, heads, queries, -1)


class AttentionChoice(NamedTuple):
    """A backend, and a line for the log: its name, and the reason of the choice."""

    backend: Backend
    line: str


def choose_attention(
    option: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[AttentionShape],
) -> AttentionChoice:
    """Choose a backend for training; auto is xformers if it works on this device, else SDPA.

    option: unet.attention_backend; shapes: of the training's attention, on which xformers is tried
    (`models.unet.attention_shapes`).

    Raises: ValueError if the option is xformers and it fails.
    """
    if option is AttentionBackend.reference:
        line = "attention: the reference, slow (unet.attention_backend)"
        return AttentionChoice(reference_attention, line)
    sdpa = sdpa_for(device)
    if option is AttentionBackend.sdpa:
        return AttentionChoice(sdpa, "attention: SDPA (unet.attention_backend)")
    reason = why_not_xformers(device, dtype, shapes)
    if reason is None:
        line = f"attention: xformers (its forward and backward work on {device} in {dtype})"
        return AttentionChoice(xformers_attention, line)
    if option is AttentionBackend.xformers:
        raise ValueError(f"unet.attention_backend=xformers, but {reason}: set auto or sdpa")
    return AttentionChoice(sdpa, f"attention: SDPA ({reason})")


def sdpa_for(device: torch.device) -> Backend:
    """Return the variant of SDPA that is faster on this device."""
    return padded_sdpa_attention if device.type == "cpu" else sdpa_attention


def why_not_xformers(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape]
) -> str | None:
    """Return the reason, in one line, why xformers cannot train here; None if it can.

    It tries the backward pass too, at full size, because kernels have limits of their own: head
    width, batch x heads, number of tokens, architecture.
    """
    if device.type == "cpu":
        return "xformers has no CPU kernels"
    for shape in shapes:
        try:
            _train_once(xformers_attention, device, dtype, shape)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            sizes = " ".join(f"{name}={size}" for name, size in shape._asdict().items())
            return f"xformers fails at {sizes}: {type(error).__name__}: {first_line}"
    return None


def _train_once(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> None:
    batch, queries, keys, heads, head_dim, masked = shape
    q, k, v = (
        torch.ones((batch, tokens, heads, head_dim), device=device, dtype=dtype, requires_grad=True)
        for tokens in (queries, keys, keys)
    )
    mask = torch.ones((batch, keys), device=device, dtype=torch.bool) if masked else None
    torch.autograd.backward(backend(q, k, v, mask).sum())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
