"""Backends of scaled dot-product attention (Vaswani et al. 2017, equation 1).

Each network has its own backend (`models.layers.blocks.use_attention`).

Shapes in this file: B batch, N queries, M keys, H heads, D width of a head.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

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
REASON_LENGTH = 300
"""[characters] Longest error of xformers in a line of the log; it lists all of its kernels."""


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


class Signature(NamedTuple):
    """What decides whether a device has a kernel for a call."""

    dtype: torch.dtype
    head_dim: int
    masked: bool

    def __str__(self) -> str:
        mask = " with a mask" if self.masked else ""
        return f"{str(self.dtype).removeprefix('torch.')} heads of {self.head_dim}{mask}"


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """A backend, with its kernels and lines for the log."""

    backend: Backend
    line: str
    """Its name and kernels, and the reason of the choice."""
    kernels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Signature → name of the kernel, for records."""


@dataclass(frozen=True, slots=True)
class XformersWhereItWorks:
    """A backend that calls xformers for the signatures it has kernels for, and SDPA for others."""

    signatures: frozenset[Signature]
    otherwise: Backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute attention."""
        works = Signature(q.dtype, q.shape[-1], mask is not None) in self.signatures
        return (xformers_attention if works else self.otherwise)(q, k, v, mask)


def choose_attention(
    option: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[AttentionShape],
) -> AttentionChoice:
    """Choose a backend for training; auto is xformers where it works on this device, else SDPA.

    option: unet.attention_backend; shapes: of the training's attention, on which xformers is tried
    (`models.unet.attention_shapes`). xformers has limits for each signature: on the newest GPUs it
    may have a kernel without a mask and none with one.

    Raises: ValueError if the option is xformers and it works for no signature.
    """
    sdpa = sdpa_for(device)
    signatures = dict.fromkeys(Signature(dtype, one.head_dim, one.masked) for one in shapes)
    if option is AttentionBackend.reference:
        kernels = dict.fromkeys(map(str, signatures), "reference")
        line = "attention: the reference, slow (unet.attention_backend)"
        return AttentionChoice(reference_attention, line, kernels)
    refused = dict.fromkeys(signatures, "unet.attention_backend")
    if option is not AttentionBackend.sdpa:
        refused = why_not_xformers(device, dtype, shapes)
    if option is AttentionBackend.xformers and refused.keys() == signatures.keys():
        reason = next(iter(refused.values()))
        raise ValueError(f"unet.attention_backend=xformers, but {reason}: set auto or sdpa")
    kernels = sdpa_kernels(device, dtype, shapes, trains=True)
    for shape in shapes:
        signature = Signature(dtype, shape.head_dim, shape.masked)
        if signature not in refused:
            kernels[str(signature)] = _xformers_kernel(device, dtype, shape)
    works = frozenset(signatures) - refused.keys()
    backend = sdpa
    if works:
        backend = XformersWhereItWorks(works, sdpa) if refused else xformers_attention
    return AttentionChoice(backend, _line(kernels, refused), kernels)


def _line(kernels: Mapping[str, str], refused: Mapping[Signature, str]) -> str:
    """Name each kernel with its signatures, then the reasons against xformers."""
    of_kernel: dict[str, list[str]] = {}
    for signature, kernel in kernels.items():
        of_kernel.setdefault(kernel, []).append(signature)
    parts = [f"{kernel} for {', '.join(found)}" for kernel, found in of_kernel.items()]
    reasons = "; ".join(dict.fromkeys(refused.values()))
    return f"attention: {'; '.join(parts)}" + (f" ({reasons})" if reasons else "")


def sdpa_for(device: torch.device) -> Backend:
    """Return the variant of SDPA that is faster on this device."""
    return padded_sdpa_attention if device.type == "cpu" else sdpa_attention


def sdpa_kernels(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape], *, trains: bool
) -> dict[str, str]:
    """Return signature → name of the kernel that SDPA takes: flash, efficient, cudnn, math.

    trains: whether a backward pass follows.
    """
    return {
        str(Signature(dtype, shape.head_dim, shape.masked)): _sdpa_kernel(
            device, dtype, shape, trains=trains
        )
        for shape in shapes
    }


def _sdpa_kernel(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, *, trains: bool
) -> str:
    q, k, v, mask = _inputs(device, dtype, shape, trains=trains)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    torch_: Any = torch  # torch declares no types for this function
    number = torch_._fused_sdp_choice(q, k, v, attn_mask=_of_all_queries(mask))
    return f"SDPA {SDPBackend(number).name.removesuffix('_ATTENTION').lower()}"


def _xformers_kernel(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> str:
    """Name the kernels that xformers takes for the forward and backward pass."""
    q, k, v, mask = _inputs(device, dtype, shape)
    fmha = xformers_ops().fmha
    bias = None if mask is None else xformers_bias(q, mask)
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias)
    forward = fmha.dispatch._dispatch_fw(inputs, True).NAME
    backward = fmha.dispatch._dispatch_bw(inputs, False).NAME
    return f"xformers {forward} {backward}"


def why_not_xformers(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape]
) -> dict[Signature, str]:
    """Return the signatures that xformers cannot train here, each with the reason in one line.

    It tries the backward pass too, at full size, because kernels have limits of their own: head
    width, batch x heads, number of tokens, architecture.
    """
    reasons: dict[Signature, str] = {}
    for shape in shapes:
        signature = Signature(dtype, shape.head_dim, shape.masked)
        if device.type == "cpu":
            reasons[signature] = "xformers has no CPU kernels"
            continue
        if signature in reasons:
            continue
        try:
            _train_once(xformers_attention, device, dtype, shape)
        except Exception as error:
            words = " ".join(str(error).split())[:REASON_LENGTH]
            sizes = " ".join(f"{name}={size}" for name, size in shape._asdict().items())
            reasons[signature] = f"xformers fails at {sizes}: {type(error).__name__}: {words}"
    return reasons


def _train_once(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> None:
    torch.autograd.backward(backend(*_inputs(device, dtype, shape)).sum())
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _inputs(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, *, trains: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Make q, k and v, that need gradients in training, and the mask."""
    batch, queries, keys, heads, head_dim, masked = shape
    q, k, v = (
        torch.ones(
            (batch, tokens, heads, head_dim), device=device, dtype=dtype, requires_grad=trains
        )
        for tokens in (queries, keys, keys)
    )
    mask = torch.ones((batch, keys), device=device, dtype=torch.bool) if masked else None
    return q, k, v, mask
