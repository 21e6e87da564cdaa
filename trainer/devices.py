"""What accelerators can do at best."""

import torch

from trainer.config import Precision

PEAK_BF16_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Part of a device's name → dense bf16 products with fp32 sums, as its data sheet has them; the
first part that is found counts."""


def peak_flops_per_s(device: torch.device, precision: Precision) -> float | None:
    """Operations a second that the device cannot exceed; None where nobody has said.

    fp32 has none: whether products run as TF32 depends on the operator.
    """
    if device.type != "cuda" or precision is not Precision.bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_BF16_TFLOPS if part in name), None)
