"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) behind one function.

Shapes in this file: B batch, N queries, M keys, H heads, D width of a head.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out as the paper's equation: what the fast backends are tested against."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by torch's own kernels."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by xformers' memory-efficient kernels."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


_backend: Backend = sdpa_attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q kᵀ / √D) v, by the backend that `probe_attention` chose (SDPA until then).

    q: [B, N, H, D]; k, v: [B, M, H, D] → [B, N, H, D].
    """
    return _backend(q, k, v)


def probe_attention(device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]) -> str:
    """Choose the process's backend: xformers where it can train on this device, else SDPA.

    head_dims: the widths of a head to try (`models.unet.attention_head_dims`).
    Returns one line for the log: the choice, and why.
    """
    global _backend
    reason = (
        "xformers has no CPU kernels"
        if device.type == "cpu"
        else why_not_xformers(device, dtype, head_dims)
    )
    if reason is None:
        _backend = xformers_attention
        return f"attention: xformers (its forward and backward work on {device} in {dtype})"
    _backend = sdpa_attention
    return f"attention: SDPA ({reason})"


def why_not_xformers(
    device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]
) -> str | None:
    """What keeps xformers from training here, in one line; None when nothing does.

    Tries the backward pass too: some builds have no operator for it on some devices, which
    otherwise shows only after a long set-up and a forward pass.
    """
    for head_dim in sorted(set(head_dims)):
        shape = (1, 16, 2, head_dim)
        q, k, v = (torch.ones(shape, device=device, dtype=dtype) for _ in range(3))
        try:
            xformers_attention(q.requires_grad_(), k, v).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            return f"xformers fails at head width {head_dim}: {type(error).__name__}: {first_line}"
    return None
