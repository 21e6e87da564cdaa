"""GPUs and their peak rates, from the table conf/gpus.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import Precision
from trainer.config.gpus import gpu_table


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: an entry of `cards` in conf/gpus.yaml; rates are peaks but for copies and mfu."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    nic_gbit_per_s: float
    pinned_gb_per_s: float
    pageable_gb_per_s: float
    mfu: Mapping[str, float]
    """Class of software → share of the peak that products reach."""


def find_gpu(name: str) -> Gpu:
    """Look up a GPU by its key in `cards`."""
    table = gpu_table()
    card: dict[str, Any] = dict(table["cards"][name])
    return Gpu(bf16_tflops=table["bf16_tflops"][card.pop("name")], **card)


def launch_s(software: str) -> float:
    """Return the seconds of an operator beside its products.

    software: a class of `launch_us` in conf/gpus.yaml.
    """
    return gpu_table()["launch_us"][software] / 1e6


def bf16_flops_per_s(device_name: str) -> float | None:
    """Return the peak rate of bf16 products, in FLOP/s; None for a device outside the table.

    device_name: the name from CUDA, such as NVIDIA A100-SXM4-80GB.
    """
    peaks: dict[str, float] = gpu_table()["bf16_tflops"]
    return next((1e12 * peak for part, peak in peaks.items() if part in device_name), None)


def inference_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the dtype of networks that do not train: train.precision on a GPU, else fp32.

    Few CPUs multiply bf16 numbers faster than fp32 ones.
    """
    bf16 = precision is Precision.bf16 and device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def peak_flops_per_s(device: torch.device, precision: Precision) -> float | None:
    """Return the device's peak rate, in FLOP/s; None for fp32 and for a device outside the table.

    fp32 has no single peak: some operators compute in TF32, others do not.
    """
    if device.type != "cuda" or precision is not Precision.bf16:
        return None
    return bf16_flops_per_s(torch.cuda.get_device_name(device))
