"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) behind one function.

Shapes in this file: B batch, N queries, M keys, H heads, D width of a head.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import AttentionBackend

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
CPU_HEAD_DIM = 16
"""The narrowest head that the CPU's matrix products handle at speed."""
XFORMERS_ALIGNMENT = 8
"""Rows of a bias begin at multiples of so many values, or its kernels refuse it."""


class Context(NamedTuple):
    """What queries attend to."""

    tokens: Tensor
    """[B, M, width]."""
    mask: Tensor | None = None
    """[B, M] bool: false for padding, which no query sees; None: there is none."""


class AttentionShape(NamedTuple):
    """The sizes of one attention."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    masked: bool = False


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out as the paper's equation: what the fast backends are tested against."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's own kernels."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, _of_all_queries(mask)).transpose(1, 2)


def padded_sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA with narrow heads padded by zeros: on the CPU up to twice as fast, backward too."""
    width = q.shape[-1]
    if width >= CPU_HEAD_DIM:
        return sdpa_attention(q, k, v, mask)
    q, k, v = (F.pad(x, (0, CPU_HEAD_DIM - width)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, _of_all_queries(mask), scale=width**-0.5)
    return mixed.transpose(1, 2)[..., :width]


def _of_all_queries(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by xformers' memory-efficient kernels."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, None if mask is None else xformers_bias(q, mask))


def xformers_bias(q: Tensor, mask: Tensor) -> Tensor:
    """What xformers adds to the scores: [B, H, N, M] of q's dtype, in the memory of [B, M]."""
    batch, queries, heads, _ = q.shape
    keys = mask.shape[1]
    whole = -(-keys // XFORMERS_ALIGNMENT) * XFORMERS_ALIGNMENT
    bias = torch.zeros((batch, whole), dtype=q.dtype, device=q.device)[:, :keys]
    bias.masked_fill_(~mask, -torch.inf)
    return bias[:, None, None].expand(-1, heads, queries, -1)


_backend: Backend = sdpa_attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax(q kᵀ / √D) v, by the backend that `choose_attention` chose (SDPA until then).

    q: [B, N, H, D]; k, v: [B, M, H, D]; mask: [B, M] bool, false for keys that no query sees, and
    true for one at least of each sample → [B, N, H, D].
    """
    return _backend(q, k, v, mask)


def choose_attention(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[AttentionShape],
) -> str:
    """Set the process's backend; auto is xformers where it can train on this device, else SDPA.

    shapes: what the run computes, to try xformers with (`models.unet.attention_shapes`).
    Returns one line for the log: the choice, and why. Raises ValueError if xformers is asked for
    and fails.
    """
    global _backend
    sdpa = padded_sdpa_attention if device.type == "cpu" else sdpa_attention
    if backend is AttentionBackend.reference:
        _backend = reference_attention
        return "attention: the reference, slow (unet.attention_backend)"
    if backend is AttentionBackend.sdpa:
        _backend = sdpa
        return "attention: SDPA (unet.attention_backend)"
    reason = why_not_xformers(device, dtype, shapes)
    if reason is None:
        _backend = xformers_attention
        return f"attention: xformers (its forward and backward work on {device} in {dtype})"
    if backend is AttentionBackend.xformers:
        raise ValueError(f"unet.attention_backend=xformers, but {reason}: set auto or sdpa")
    _backend = sdpa
    return f"attention: SDPA ({reason})"


def why_not_xformers(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape]
) -> str | None:
    """What keeps xformers from training here, in one line; None when nothing does.

    Tries the backward pass too, at full size: its kernels have limits of their own, by head width,
    batch x heads, number of tokens and architecture, which otherwise show only in the first step.
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
    backend(q, k, v, mask).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
