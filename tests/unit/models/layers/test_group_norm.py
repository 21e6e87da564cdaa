import json
import subprocess
import sys
from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.layers import group_norm, group_norm_kernels
from models.layers.blocks import use_attention
from models.layers.group_norm import GroupNorm, GroupNormModulateSiLU, GroupNormSiLU
from models.unet import UNet2DCondition
from tests.support.cudnn_layouts import Layouts, channels_last, flash_attention
from tests.support.layers import assert_same_with_gradients, random
from tests.support.paths import ROOT
from tests.support.unet_files import described_unet

UNETS = ["sd1", "sd2", "ldm4_class", "ldm4_unconditional", "ldm8_churches", "ldm8_class"]
MEANS = [0.0, 4.0, 16.0]
"""Of the input, in standard deviations."""
LARGEST_ERRORS = {"float32": 2e-6, "bfloat16": 2**-8}
"""Relative to float64; the interpreter rounds to bf16 by cutting off bits."""


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_silu_is_torchs_two_layers(
    memory_format: torch.memory_format, groups: int, shifted: bool
) -> None:
    layer = random(GroupNormSiLU(groups, 12, eps=1e-5))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    shift = [torch.randn(3, 12, dtype=torch.float64)] if shifted else []

    def expected(x: Tensor, *shift: Tensor) -> Tensor:
        for each in shift:
            x = x + each[:, :, None, None]
        return F.silu(F.group_norm(x, groups, layer.weight, layer.bias, 1e-5))

    assert_same_with_gradients(layer, expected, [x, *shift], list(layer.parameters()))


def assert_modulates(memory_format: torch.memory_format) -> None:
    layer = random(GroupNormModulateSiLU(4, 12, 1e-5))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    scale_and_shift = torch.randn(3, 24, dtype=torch.float64)

    def expected(x: Tensor, scale_and_shift: Tensor) -> Tensor:
        scale, shift = scale_and_shift[:, :, None, None].chunk(2, dim=1)
        normed = F.group_norm(x, 4, layer.weight, layer.bias, 1e-5)
        return F.silu(normed * (1 + scale) + shift)

    assert_same_with_gradients(layer, expected, [x, scale_and_shift], list(layer.parameters()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_modulation_is_torchs_layers(memory_format: torch.memory_format) -> None:
    assert_modulates(memory_format)


def test_both_layouts_have_the_same_gradients_in_bf16() -> None:
    torch.manual_seed(0)
    layer = GroupNormSiLU(4, 32, eps=1e-5).to(torch.bfloat16)
    x, probe = torch.randn(2, 2, 32, 9, 9).to(torch.bfloat16)
    results: list[tuple[Tensor, ...]] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        results.append(torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], probe))
        assert all(each.dtype is torch.bfloat16 for each in results[-1])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 2**-7 * expected.norm()


@pytest.fixture
def by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers normalise by our operator, here by its equations."""
    monkeypatch.setattr(group_norm, "can_normalise", channels_last)


@pytest.mark.usefixtures("by_operator")
@pytest.mark.parametrize("shifted", [False, True])
def test_the_operator_is_torchs_layers(shifted: bool) -> None:
    layer = random(GroupNormSiLU(4, 12, eps=1e-5))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    shift = [torch.randn(3, 12, dtype=torch.float64)] if shifted else []

    def expected(x: Tensor, *shift: Tensor) -> Tensor:
        for each in shift:
            x = x + each[:, :, None, None]
        return F.silu(F.group_norm(x, 4, layer.weight, layer.bias, 1e-5))

    assert_same_with_gradients(layer, expected, [x, *shift], list(layer.parameters()))


@pytest.mark.usefixtures("by_operator")
def test_the_operator_alone_is_torchs_layer() -> None:
    layer = random(GroupNorm(4, 12, eps=1e-6))
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = nn.GroupNorm.forward.__get__(layer)
    assert_same_with_gradients(layer, expected, [x], list(layer.parameters()))
    assert channels_last(layer(x))


@pytest.mark.usefixtures("by_operator")
def test_the_operator_modulates() -> None:
    assert_modulates(torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modulated", [False, True])
def test_torch_can_trace_the_operator(dtype: torch.dtype, modulated: bool) -> None:
    """Its schema, its shapes and layouts without data, its gradients, and torch.compile."""
    torch.manual_seed(0)
    shapes = [(2, 8, 3, 5), None if modulated else (2, 8), (2, 16) if modulated else None, 8, 8]
    x, *tensors = (
        None if shape is None else torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in shapes
    )
    assert x is not None
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(group_norm.group_norm, (x, *tensors, 2, 1e-5, True))


def interpreted(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The errors of the kernels, in a process of their own: Triton chooses when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.group_norm_errors"],
        input=json.dumps(cases),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def normalised_shapes() -> list[tuple[int, int]]:
    """Channels and groups of every normalisation in the U-Nets of the papers."""
    shapes: set[tuple[int, int]] = set()
    for name in UNETS:
        with torch.device("meta"):
            unet = UNet2DCondition(described_unet(name))
        for layer in unet.modules():
            if isinstance(layer, nn.GroupNorm):
                shapes.add((layer.num_channels, layer.num_groups))
            elif isinstance(layer, GroupNormModulateSiLU):
                shapes.add((layer.weight.numel(), layer.groups))
    return sorted(shapes)


def assert_exact(cases: list[dict[str, Any]]) -> None:
    for case, errors in zip(cases, interpreted(cases), strict=True):
        largest = LARGEST_ERRORS[case["dtype"]]
        assert max(errors.values()) < largest, (case, errors)


def test_kernels_are_exact_at_the_widths_of_the_papers() -> None:
    shapes = normalised_shapes()
    assert len(shapes) == 24
    kinds = [{}, {"before": True}, {"modulated": True}, {"silu": False}]
    turns = zip(shapes, cycle(product(LARGEST_ERRORS, MEANS)), cycle(kinds), strict=False)
    assert_exact(
        [
            {"channels": channels, "groups": groups, "side": 2, "mean": mean, "dtype": dtype} | kind
            for (channels, groups), (dtype, mean), kind in turns
        ]
    )


def test_kernels_are_exact_over_several_samples_chunks_and_blocks() -> None:
    """1024 pixels are two chunks, 33 x 33 are three with a rest; 96 channels are 1.5 blocks."""
    case = {"channels": 96, "groups": 2, "side": 33, "dtype": "float32", "batch": 2}
    kinds = [{"before": True}, {"modulated": True}, {"silu": False}]
    cases = [{**case, "mean": mean} | kind for mean, kind in zip(MEANS, kinds, strict=True)]
    assert_exact([*cases, {**case, "side": 1, "mean": 16.0}])


@pytest.mark.campaign
@pytest.mark.parametrize("side", [1, 2, 8, 32])
def test_kernels_are_exact_in_all_cases(side: int) -> None:
    shapes, kinds = normalised_shapes(), [{"before": True}, {"modulated": True}, {"silu": False}]
    assert_exact(
        [
            {"channels": channels, "groups": groups, "side": side, "mean": mean, "dtype": dtype}
            | kind
            for (channels, groups), mean, dtype, kind in product(
                shapes, MEANS, LARGEST_ERRORS, kinds
            )
        ]
    )


POINTERS = {"x", "y", "grad", "grad_x", "before", "modulation", "weight", "bias"}
NUMBERS = {"pixels": "i32", "channels": "i32", "chunks": "i32", "eps": "fp32"}
KERNELS = [
    "channel_moments",
    "group_moments",
    "output",
    "channel_sums",
    "group_sums",
    "input_gradient",
]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_gpus(capability: int) -> None:
    """For bf16 tensors, down to machine code; that needs no GPU."""
    constants = {"BEFORE": True, "MODULATED": True, "SILU": True, "WIDTH": 10, "BLOCK": 16}
    for name in KERNELS:
        kernel: Any = getattr(group_norm_kernels, name)
        names = [parameter.name for parameter in kernel.params]
        given = {name: constants[name] for name in names if name in constants}
        types = {
            name: "constexpr"
            if name in given
            else NUMBERS.get(name, "*bf16" if name in POINTERS else "*fp32")
            for name in names
        }
        source = ASTSource(kernel, types, {(names.index(name),): given[name] for name in given})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


@pytest.mark.parametrize(("name", "convolutions"), [("sd2", 66), ("ldm8_churches", 89)])
def test_all_convolutions_of_a_gpu_are_channels_last(name: str, convolutions: int) -> None:
    config = described_unet(name)
    with torch.device("meta"):
        unet = UNet2DCondition(config).to(torch.bfloat16).to(memory_format=torch.channels_last)
        use_attention(unet, flash_attention)
        latents = torch.empty(2, config.in_channels, 64, 64, dtype=torch.bfloat16)
        latents = latents.contiguous(memory_format=torch.channels_last)
        tokens = torch.empty(2, 77, config.context_dim, dtype=torch.bfloat16)
        with Layouts() as layouts:
            output = unet(
                latents,
                torch.empty(2, dtype=torch.long),
                tokens if config.context_dim else None,
            )
            output.square().mean().backward()
    assert len(layouts.forward) == len(layouts.backward) == convolutions
    assert all(each.input and each.weight for each in (*layouts.forward, *layouts.backward))
    # a gradient is a slice where x and a skip were concatenated
    assert sum(bool(each.grad) for each in layouts.backward) >= 0.8 * convolutions
    assert layouts.copies == []
