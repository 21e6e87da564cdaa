"""The networks of the paper."""

import yaml

from models.config import UNetConfig
from tests.support.paths import ROOT

FOLDERS = (ROOT / "conf" / "unet", ROOT / "tests" / "support" / "unets")
"""The second has the U-Nets with a concatenated condition, which no experiment can train yet."""


def described_unet(name: str) -> UNetConfig:
    """The U-Net of the one file NAME.yaml."""
    (file,) = (folder / f"{name}.yaml" for folder in FOLDERS if (folder / f"{name}.yaml").exists())
    return UNetConfig(**yaml.safe_load(file.read_text()))
