"""A workshop whose pictures have label maps, with images beside its latents."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.workshop import Workshop, draw_pictures
from trainer.pack.job import pack
from trainer.precompute.job import precompute

GROUND, SHAPE = 0, 1
"""Classes of the label maps."""
KINDS = {
    "emoji_super_resolution": ["conditioner.degradation=bsr_light"],
    "emoji_inpainting": [],
    "scenes_semantic_map": ["conditioner.num_classes=2", "data.captions=text", "data.boxes=false"],
}
"""Experiments with spatial conditions, and what fits them to the pictures."""


def with_conditions(workshop: Workshop, folder: Path) -> Workshop:
    """Draw pictures with their label maps, pack them, and store images beside latents."""
    shop = Workshop(folder)
    draw_pictures(folder / "pictures")
    for path in sorted((folder / "pictures").glob("*.png")):
        image = np.asarray(Image.open(path))
        labels = np.where((image == 255).all(2), GROUND, SHAPE).astype(np.uint8)
        Image.fromarray(labels).save(path.with_suffix(".map.png"))
    shutil.copy(workshop.folder / "first_stage_4.safetensors", folder)
    config = shop.config("emoji", "data.maps=true", "data.store_images=true", "data.flip=true")
    pack(config)
    precompute(config)
    return shop
