import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention as module
from models.attention import (
    attention,
    probe_attention,
    reference_attention,
    sdpa_attention,
    why_not_xformers,
)

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8, 20, 40]),
)
def test_sdpa_agrees_with_the_equation_forward_and_backward(batch, queries, keys, heads, width):
    torch.manual_seed(0)
    shapes = [(batch, count, heads, width) for count in (queries, keys, keys)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    probe = torch.randn(shapes[0])
    results = []
    for backend in (sdpa_attention, reference_attention):
        output = backend(*inputs)
        assert output.shape == probe.shape
        results.append((output, *torch.autograd.grad((output * probe).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_the_equation_is_an_average_of_the_values():
    v = torch.randn(2, 5, 3, 4)
    uniform = reference_attention(torch.zeros(2, 1, 3, 4), torch.randn(2, 5, 3, 4), v)
    torch.testing.assert_close(uniform, v.mean(dim=1, keepdim=True))


def test_on_the_cpu_the_probe_takes_sdpa_and_says_why(monkeypatch):
    monkeypatch.setattr(module, "_backend", reference_attention)
    line = probe_attention(CPU, torch.float32, [8])
    assert line == "attention: SDPA (xformers has no CPU kernels)"
    assert module._backend is sdpa_attention


def test_a_device_without_kernels_is_one_line_of_reason():
    reason = why_not_xformers(CPU, torch.float32, [40, 8])
    assert reason is not None
    assert reason.startswith("xformers fails at head width 8: NotImplementedError")
    assert "\n" not in reason


@pytest.mark.parametrize("backend", [sdpa_attention, reference_attention])
def test_attention_runs_the_chosen_backend(monkeypatch, backend):
    monkeypatch.setattr(module, "_backend", lambda q, k, v: backend(q, k, v) + 1.0)
    q = torch.randn(1, 4, 2, 8)
    torch.testing.assert_close(attention(q, q, q), reference_attention(q, q, q) + 1.0)
