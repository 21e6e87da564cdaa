"""Versions, the attention kernels of this device, and what it can do at most."""

import importlib.util
from importlib.metadata import version

import torch

from models.layers.attention import AttentionShape, sdpa_kernels, why_not_xformers, xformers_ops
from tests.benchmarks.gpu.setting import Setting

WIDTHS = (40, 64, 80, 160, 512)


def measure(setting: Setting) -> None:
    """Note them."""
    setting.note("torch", torch.__version__)
    if setting.on_gpu:
        setting.note("device", torch.cuda.get_device_name(setting.device))
        setting.note("capability", str(torch.cuda.get_device_capability(setting.device)))
    shapes = [AttentionShape(2, 64, 77, 4, width) for width in WIDTHS]
    kernels = sdpa_kernels(setting.device, setting.dtype, shapes, trains=True)
    for signature, kernel in kernels.items():
        setting.note(f"SDPA, {signature}", kernel)
    if importlib.util.find_spec("xformers"):
        xformers_ops()
        common = importlib.import_module("xformers.ops.fmha.common")
        refused = why_not_xformers(setting.device, setting.dtype, shapes)
        setting.note("xformers", version("xformers"))
        setting.note("xformers_built_with_cuda", int(common._built_with_cuda))
        setting.note("xformers_widths_refused", len(refused))
    side = 256 if setting.small else 8192
    left, right = torch.randn(2, side, side, device=setting.device).to(setting.dtype)
    (spent_s,) = setting.median_s(lambda: left @ right)
    setting.note("product_tflops", 2 * side**3 / spent_s / 1e12)
    size = 2**20 if setting.small else 2**32
    source = torch.randint(256, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    (spent_s,) = setting.median_s(lambda: target.copy_(source))
    setting.note("copy_tb_per_s", 2 * source.numel() / spent_s / 1e12)
