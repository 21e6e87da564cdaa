"""The networks of the paper."""

import yaml

from models.config import UNetConfig
from tests.support.paths import ROOT


def described_unet(name: str) -> UNetConfig:
    """The U-Net of conf/unet/NAME.yaml."""
    return UNetConfig(**yaml.safe_load((ROOT / "conf" / "unet" / f"{name}.yaml").read_text()))
