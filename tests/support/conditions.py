"""A workshop whose pictures have label maps and boxes, with images beside its latents."""

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.workshop import Workshop, draw_pictures
from trainer.pack.job import pack
from trainer.precompute.job import precompute

GROUND, SHAPE = 0, 1
"""Classes of the label maps."""
SHAPES = ["circle", "square"]
"""Labels of the boxes."""
ANNOTATED = ["data.maps=true", "data.boxes=true"]
TOKENS = ["conditioner.width=32", "conditioner.layers=2", "unet.context_dim=32", "data.maps=false"]
KINDS = {
    "emoji_super_resolution": ["conditioner.degradation=bsr_light"],
    "emoji_inpainting": [],
    "scenes_semantic_map": ["conditioner.num_classes=2", "data.captions=text", "data.boxes=false"],
    "scenes_layout": [*TOKENS, f"conditioner.classes={SHAPES}", "data.captions=text"],
    "scenes_text": [
        *TOKENS,
        "conditioner.cond_drop_prob=0.5",
        "data.captions=text",
        "data.boxes=false",
    ],
}
"""Experiments with conditions of their own networks, and what fits them to the pictures."""
KL = ["autoencoder=kl_f4"]  # of which the workshop has one with three channels
FULL_SIZE = {
    "super_resolution_256": KL,
    "inpainting_256": KL,
    "semantic_map_256": [*KL, "conditioner.num_classes=2"],
    "layout_256": [*KL, *TOKENS, f"conditioner.classes={SHAPES}"],
}
"""The paper's experiments of these kinds, and what fits them to the pictures."""


def box_of(labels: NDArray[np.uint8], label: str) -> dict[str, object]:
    """The box around a shape in a label map [H, W], in parts of the sides."""
    (height, width), (rows, columns) = labels.shape, np.nonzero(labels == SHAPE)
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    sides = [width, height] * 2
    return {"label": label, "box": [int(c) / side for c, side in zip(corners, sides, strict=True)]}


def with_conditions(workshop: Workshop, folder: Path, experiment: str = "emoji") -> Workshop:
    """Draw pictures with label maps and boxes, pack them, and store images beside latents.

    experiment: with the latents' channels, and no condition made of images.
    """
    shop = Workshop(folder)
    draw_pictures(folder / "pictures")
    for path in sorted((folder / "pictures").glob("*.png")):
        image = np.asarray(Image.open(path))
        labels = np.where((image == 255).all(2), GROUND, SHAPE).astype(np.uint8)
        Image.fromarray(labels).save(path.with_suffix(".map.png"))
        label = path.with_suffix(".txt").read_text().split()[-1]
        path.with_suffix(".boxes.json").write_text(json.dumps([box_of(labels, label)]))
    for stage in workshop.folder.glob("first_stage_*.safetensors"):
        shutil.copy(stage, folder)
    config = shop.config(experiment, *ANNOTATED, "data.store_images=true", "data.flip=true")
    pack(config)
    precompute(config)
    return shop
