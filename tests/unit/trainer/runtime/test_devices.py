"""Peaks by the names that CUDA gives devices."""

import pytest
import torch
import yaml

from tests.support.paths import ROOT
from trainer.config import Precision
from trainer.runtime.devices import bf16_flops_per_s, find_gpu, peak_flops_per_s

TABLE = yaml.safe_load((ROOT / "conf" / "gpus.yaml").read_text())


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peak_of_a_device(device_name: str, tflops: float | None) -> None:
    peak = bf16_flops_per_s(device_name)
    assert peak == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_no_part_of_a_name_hides_a_later_one() -> None:
    parts = list(TABLE["bf16_tflops"])
    hidden = [(a, b) for place, a in enumerate(parts) for b in parts[place + 1 :] if a in b]
    assert not hidden


@pytest.mark.parametrize("name", TABLE["cards"])
def test_a_card_has_the_peak_of_its_chip(name: str) -> None:
    chip = name.partition("_")[0].upper().replace("RTX", "RTX ")
    assert 1e12 * find_gpu(name).bf16_tflops == bf16_flops_per_s(f"NVIDIA {chip}")


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops_per_s(torch.device("cpu"), Precision.bf16) is None
