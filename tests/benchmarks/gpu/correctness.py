"""The tests of tests/gpu, and how errors of group normalisation grow with the mean."""

import contextlib
import io
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.group_norm import _GroupNormSiLU
from models.layers.group_norm_ops import group_norm
from tests.benchmarks.gpu.setting import Setting
from tests.support.errors import relative_errors
from tests.support.paths import ROOT

GROUPS, EPS = 32, 1e-5


def measure(setting: Setting) -> None:
    """Note their numbers; the names of failed ones are printed."""
    for name, function in {"torch": torchs_layout, "channels_last": channels_last}.items():
        errors = [norm_error(function, mean, setting) for mean in (0.0, 8.0)]
        setting.note(f"group_norm_{name}_error", errors[0])
        setting.note(f"group_norm_{name}_growth", errors[1] / errors[0])
    words = ["tests/gpu", "-m", "gpu", "-W", "default", "--continue-on-collection-errors"]
    place = ["--rootdir", str(ROOT), "--confcutdir", "tests/gpu", "-p", "no:cacheprovider"]
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        code = pytest.main([*words, *place, "--tb=short"])
    print(out.getvalue())
    setting.note("tests_exit_code", int(code))
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    counts |= {word: int(n) for n, word in re.findall(r"(\d+) (\w+?)s?\b", last_line(out))}
    for word in ("passed", "failed", "skipped", "error"):
        setting.note(f"tests_{word}", counts[word])


def last_line(out: io.StringIO) -> str:
    return out.getvalue().strip().rpartition("\n")[2]


def norm_error(function: Callable[..., Tensor], mean: float, setting: Setting) -> float:
    """The largest relative error of output and gradients in bf16."""
    torch.manual_seed(0)
    side = 4 if setting.small else 64
    x = torch.randn(2, 320, side, side, device=setting.device) + mean
    affine = torch.randn(2, 320, device=setting.device)
    inputs = [each.to(torch.bfloat16) for each in (x, *affine)]
    return max(relative_errors(function, exact, inputs))


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def torchs_layout(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _GroupNormSiLU.apply(x, None, weight, bias, GROUPS, EPS)


def channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return group_norm(x, None, None, weight, bias, GROUPS, EPS, True)[0]
