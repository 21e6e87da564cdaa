"""The table of GPUs, conf/gpus.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

import conf


@cache
def gpu_table() -> dict[str, dict[str, Any]]:
    """Return the table: `bf16_tflops` by device name, `launch_us` by class of software, and `cards`
    by the names of plan.gpu."""
    return yaml.safe_load((Path(conf.__path__[0]) / "gpus.yaml").read_text())
