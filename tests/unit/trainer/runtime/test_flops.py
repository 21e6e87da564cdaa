"""FLOPs of every kernel of attention against the paper's equation, and of products against torch's.

GPU kernels are called on fake tensors: no GPU is needed, and nothing is computed.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from xformers.ops.fmha.common import Inputs

from models.layers.attention import (
    Backend,
    padded_sdpa_attention,
    reference_attention,
    sdpa_attention,
    xformers_ops,
)
from trainer.runtime.flops import KERNELS, FlopCounter, flops_of


def counted(backend: Backend, sizes: tuple[int, int, int, int, int]) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    batch, queries, keys, heads, width = sizes
    q, k, v = (
        torch.randn(batch, tokens, heads, width, requires_grad=True)
        for tokens in (queries, keys, keys)
    )
    with FlopCounter() as forward:
        made = backend(q, k, v, None).sum()
    with FlopCounter() as backward:
        torch.autograd.backward(made)
    return forward.flops, backward.flops


@pytest.mark.parametrize("backend", [reference_attention, sdpa_attention])
@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(2, 9)] * 4, st.sampled_from([4, 16, 20])))
def test_attention_on_a_cpu_counts_as_the_equation(
    backend: Backend, sizes: tuple[int, int, int, int, int]
) -> None:
    batch, queries, keys, heads, width = sizes
    product = 2 * batch * heads * queries * keys * width
    assert counted(backend, sizes) == (2 * product, 4 * product)


def test_padding_of_narrow_heads_counts_as_it_is_computed() -> None:
    assert counted(padded_sdpa_attention, (2, 5, 3, 4, 8)) == counted(
        sdpa_attention, (2, 5, 3, 4, 16)
    )


def test_products_count_as_torch_counts_them() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(2),
        nn.Linear(64, 5),
        nn.GELU(),
    )
    with FlopCounter() as ours, FlopCounterMode(display=False) as theirs:
        torch.autograd.backward(module(torch.randn(2, 3, 15, 15)).sum())
    assert ours.flops == theirs.get_total_flops() > 100_000


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_their_arguments_where_we_look(name: str) -> None:
    xformers_ops()  # its import registers its operators
    kernel = KERNELS[name]
    space, _, operator_name = name.partition("::")
    operator: Any = getattr(getattr(torch.ops, space), operator_name).default
    names = [argument.name for argument in operator._schema.arguments]
    assert names[kernel.first : kernel.first + 3] == ["query", "key", "value"]
    q, k = (torch.empty(2, tokens, 3, 8, device="meta") for tokens in (5, 7))
    if "scaled_dot_product" in name:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    found = flops_of(operator, [*[None] * kernel.first, q, k, k], {}, None)
    products = 4 if "backward" in name or "bwd" in name else 2
    assert found == products * (2 * 2 * 3 * 5 * 7 * 8)


@pytest.mark.parametrize("kernel", ["flash", "cutlass"])
def test_xformers_and_sdpa_count_alike_on_a_gpu(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = getattr(xformers_ops().fmha, kernel).FwOp
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode():
        q, k = (
            torch.empty(2, tokens, 4, 40, device="cuda", dtype=torch.bfloat16)
            for tokens in (64, 77)
        )
        with FlopCounter() as ours:
            forward.apply(Inputs(query=q, key=k, value=k), needs_gradient=True)
        with FlopCounter() as theirs:
            sdpa_attention(q, k, k)
    assert ours.flops == theirs.flops == 2 * (2 * (2 * 4) * 64 * 77 * 40)
