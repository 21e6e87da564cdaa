import re
import subprocess
import sys
from typing import Any, Never

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xformers.ops.fmha.common import Inputs
from xformers.ops.fmha.cutlass import BwOp, FwOp

from models.config import AttentionBackend, UNetConfig
from models.layers import attention as module
from models.layers.attention import (
    CPU_HEAD_DIM,
    AttentionShape,
    Backend,
    Signature,
    choose_attention,
    padded_sdpa_attention,
    reference_attention,
    sdpa_attention,
    why_not_xformers,
    xformers_bias,
)
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.support.paths import ROOT

CPU = torch.device("cpu")


SHAPES = [AttentionShape(2, 16, 5, 2, 8, masked=True), AttentionShape(2, 16, 16, 2, 8)]


def random_mask(batch: int, keys: int) -> torch.Tensor:
    """True for one key at least of each sample."""
    mask = torch.rand(batch, keys) < 0.5
    mask[torch.arange(batch), torch.randint(keys, (batch,))] = True
    return mask


def assert_same(
    backend: Backend,
    inputs: list[torch.Tensor],
    rtol: float,
    atol: float,
    mask: torch.Tensor | None = None,
) -> None:
    """Outputs and gradients are those of the equation."""
    probe = torch.randn_like(inputs[0])
    results = []
    for compute in (backend, reference_attention):
        q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
        output = compute(q, k, v, mask)
        assert output.shape == probe.shape
        results.append((output, *torch.autograd.grad((output * probe).sum(), leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", [sdpa_attention, padded_sdpa_attention])
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8, 20, 40]),
    st.booleans(),
)
def test_sdpa_agrees_with_the_equation_forward_and_backward(
    backend: Backend, batch: int, queries: int, keys: int, heads: int, width: int, masked: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(batch, count, heads, width) for count in (queries, keys, keys)]
    inputs = [torch.randn(shape) for shape in shapes]
    mask = random_mask(batch, keys) if masked else None
    assert_same(backend, inputs, rtol=1e-4, atol=2e-5, mask=mask)


def test_masked_keys_have_no_part_in_the_equation() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, 3, 4) for count in (6, 5, 5))
    mask = torch.tensor([[True, True, False, True, False], [False, False, True, True, True]])
    found = reference_attention(q, k, v, mask)
    for sample, seen in enumerate(mask):
        one = slice(sample, sample + 1)
        expected = reference_attention(q[one], k[one][:, seen], v[one][:, seen])
        torch.testing.assert_close(found[one], expected)


@pytest.mark.parametrize("keys", [1, 5, 8, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_takes_our_bias_which_says_what_the_mask_says(
    keys: int, dtype: torch.dtype
) -> None:
    """Its kernels state what keeps them from a computation; the device does here."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, 3, 16, dtype=dtype) for count in (6, keys, keys))
    mask = random_mask(2, keys)
    bias = xformers_bias(q, mask)
    for kernel in (FwOp, BwOp):
        reasons = kernel.not_supported_reasons(Inputs(query=q, key=k, value=v, attn_bias=bias))
        assert [reason for reason in reasons if "bias" in reason] == []
    q, k, v = (x.float() for x in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias.float()
    )
    expected = reference_attention(q, k, v, mask)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_the_equation_is_an_average_of_the_values() -> None:
    v = torch.randn(2, 5, 3, 4)
    uniform = reference_attention(torch.zeros(2, 1, 3, 4), torch.randn(2, 5, 3, 4), v)
    torch.testing.assert_close(uniform, v.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("backend", "line", "chosen"),
    [
        (
            AttentionBackend.auto,
            "attention: SDPA flash for float32 heads of 8 with a mask, float32 heads of 8 "
            "(xformers has no CPU kernels)",
            padded_sdpa_attention,
        ),
        (
            AttentionBackend.sdpa,
            "attention: SDPA flash for float32 heads of 8 with a mask, float32 heads of 8 "
            "(unet.attention_backend)",
            padded_sdpa_attention,
        ),
        (
            AttentionBackend.reference,
            "attention: the reference, slow (unet.attention_backend)",
            reference_attention,
        ),
    ],
)
def test_on_the_cpu_the_choice_is_one_line(
    backend: AttentionBackend, line: str, chosen: Backend
) -> None:
    choice = choose_attention(backend, CPU, torch.float32, SHAPES)
    assert (choice.backend, choice.line) == (chosen, line)
    kernel = "reference" if chosen is reference_attention else "SDPA flash"
    assert choice.kernels == {
        "float32 heads of 8 with a mask": kernel,
        "float32 heads of 8": kernel,
    }


def test_xformers_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unet\.attention_backend=xformers, but xformers has no"):
        choose_attention(AttentionBackend.xformers, CPU, torch.float32, SHAPES)


def try_on_another_device(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> dict[Signature, str]:
    """What is said of xformers on the meta device, which computes shapes alone."""
    monkeypatch.setattr(module, "xformers_attention", backend)
    return why_not_xformers(torch.device("meta"), torch.bfloat16, SHAPES)


MASKED, PLAIN = (Signature(torch.bfloat16, 8, masked) for masked in (True, False))


def test_xformers_is_tried_with_every_shape_and_the_dtype_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def works(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        sizes = (*q.shape[:2], k.shape[1], *q.shape[2:], mask is not None)
        tried.append((q.dtype, AttentionShape._make(sizes)))
        return sdpa_attention(q, k, v, mask)

    assert try_on_another_device(monkeypatch, works) == {}
    assert tried == [(torch.bfloat16, shape) for shape in SHAPES]


def test_a_failing_forward_is_one_short_line_of_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError("no operator found\n  for these inputs" + 999 * "\nmore")

    reasons = try_on_another_device(monkeypatch, fails)
    assert reasons.keys() == {MASKED, PLAIN}
    assert reasons[MASKED].startswith(
        "xformers fails at batch=2 queries=16 keys=5 heads=2 head_dim=8 masked=True: "
        "NotImplementedError: no operator found for these inputs more"
    )
    assert len(reasons[MASKED]) < 500
    assert "\n" not in reasons[MASKED]


def test_a_failing_backward_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Never:
            raise RuntimeError("no backward kernel")

    reasons = try_on_another_device(monkeypatch, lambda q, k, v, mask: OnlyForward.apply(q, k, v))
    assert reasons.keys() == {MASKED, PLAIN}
    assert all(reason.endswith("RuntimeError: no backward kernel") for reason in reasons.values())


@pytest.mark.parametrize("option", [AttentionBackend.auto, AttentionBackend.xformers])
def test_a_refused_signature_falls_back_alone(
    option: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on capability 10: kernels without a mask, none with one."""
    called: list[str] = []

    def only_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise NotImplementedError("too new")
        called.append("xformers")
        return sdpa_attention(q, k, v, mask)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        called.append("SDPA")
        return sdpa_attention(q, k, v, mask)

    monkeypatch.setattr(module, "xformers_attention", only_plain)
    monkeypatch.setattr(module, "sdpa_attention", sdpa)
    monkeypatch.setattr(module, "_xformers_kernel", lambda *_: "xformers fa2")
    choice = choose_attention(option, torch.device("meta"), torch.bfloat16, SHAPES)
    assert choice.line == (
        "attention: SDPA math for bfloat16 heads of 8 with a mask; xformers fa2 for bfloat16 heads "
        "of 8 (xformers fails at batch=2 queries=16 keys=5 heads=2 head_dim=8 masked=True: "
        "NotImplementedError: too new)"
    )
    assert choice.kernels == {str(MASKED): "SDPA math", str(PLAIN): "xformers fa2"}
    called.clear()
    q, k = torch.randn(2, 6, 2, 8), torch.randn(2, 5, 2, 8)
    mask = random_mask(2, 5)
    for dtype, own in [(torch.bfloat16, None), (torch.bfloat16, mask), (torch.float32, None)]:
        found = choice.backend(q.to(dtype), k.to(dtype), k.to(dtype), own)
        assert found.shape == q.shape
    # nobody has tried xformers on fp32: it gets SDPA, which takes all input
    assert called == ["xformers", "SDPA", "SDPA"]


def test_narrow_heads_are_padded_on_the_cpu_and_others_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        widths.append(q.shape[-1])
        return real(q, k, v, mask, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    for width in (4, CPU_HEAD_DIM, 40):
        padded_sdpa_attention(*[torch.randn(1, 3, 2, width) for _ in range(3)])
    assert widths == [CPU_HEAD_DIM, CPU_HEAD_DIM, 40]


def test_networks_of_one_process_keep_their_own_backends() -> None:
    config = UNetConfig(
        block_out_channels=[16], attention=[True], heads=[2], context_dim=8, norm_groups=8
    )
    calls: list[str] = []

    def counted(name: str, backend: Backend) -> Backend:
        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            calls.append(name)
            return backend(q, k, v, mask)

        return compute

    networks = {"first": UNet2DCondition(config), "second": UNet2DCondition(config)}
    for parameter in networks["first"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    networks["second"].load_state_dict(networks["first"].state_dict())
    use_attention(networks["first"], counted("first", reference_attention))
    use_attention(networks["second"], counted("second", sdpa_attention))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 977]), torch.randn(2, 5, 8)
    outputs = {}
    for name in ("first", "second", "first"):
        outputs[name] = networks[name](*inputs)
    # six transformers, two on the way down, one in the middle and three on the way up, attend twice
    assert calls == ["first"] * 12 + ["second"] * 12 + ["first"] * 12
    assert outputs["first"].abs().max() > 0.1
    torch.testing.assert_close(outputs["first"], outputs["second"], rtol=1e-4, atol=1e-5)


ON_A_GPU = """
import itertools
from unittest import mock
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from models.layers import attention as ours
ours.xformers_ops()
from xformers.ops.fmha import common
assert common._built_with_cuda
for capability, dtype, width, masked in itertools.product(
    [(8, 0), (9, 0), (10, 0)],
    [torch.bfloat16, torch.float32],
    [40, 64, 80, 160, 512],
    [False, True],
):
    # made before: xformers takes no fake tensor for a bias
    q = torch.empty(2, 64, 8, width, dtype=dtype, device="meta")
    bias = ours.xformers_bias(q, torch.empty(2, 77, dtype=torch.bool, device="meta"))
    with (
        mock.patch.object(ours, "xformers_bias", lambda *_: bias),
        mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
        mock.patch("torch.cuda.is_available", lambda: True),
        FakeTensorMode(),
    ):
        shape = ours.AttentionShape(2, 64, 77, 8, width, masked)
        try:
            names = ours._xformers_kernel(torch.device("cuda"), dtype, shape)
        except NotImplementedError:
            names = "none"
    print(*capability, ours.Signature(dtype, width, masked), "->", names)
"""


def test_xformers_has_kernels_for_the_heads_of_gpus() -> None:
    """In the environment that `make` builds, without a GPU: it would say what it lacks."""
    words = [sys.executable, "-c", ON_A_GPU]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    found = dict(line.split(" -> ") for line in done.stdout.splitlines())
    assert len(found) == 60
    for call, names in found.items():
        newest = call.startswith("10 0")
        if "bfloat16" in call and "512" not in call and "mask" not in call:
            expected = r"xformers fa2F\S+ fa2B\S+"
        else:
            expected = "none" if newest else r"xformers cutlassF\S* cutlassB\S*"
        assert re.fullmatch(expected, names), f"{call}: {names}"
