"""No file of a config group can only be refused: each passes the checks with some experiment."""

import pytest

from tests.support.paths import ROOT
from trainer.cli import load_config

FILES = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in (ROOT / "conf").glob("*/*.yaml")
    if path.parent.name != "experiment"
)
EMOJI = ["+experiment=emoji"]
CLASSES = ["+experiment=imagenet_256"]
TEXT = ["+experiment=laion_256"]
NO_TERMINAL_SNR = ["diffusion.zero_terminal_snr=false"]
FITTING = {
    "autoencoder/emoji_f4": EMOJI,
    "autoencoder/identity": ["+experiment=ffhq_256"],
    "autoencoder/kl_f16": [*TEXT, "unet.in_channels=16", "unet.out_channels=16"],
    "autoencoder/kl_f32": [*TEXT, "unet.in_channels=64", "unet.out_channels=64"],
    "autoencoder/kl_f4": CLASSES,
    "autoencoder/kl_f8": TEXT,
    "autoencoder/vq_f16": [*TEXT, "unet.in_channels=8", "unet.out_channels=8"],
    "autoencoder/vq_f4": CLASSES,
    "autoencoder/vq_f4_no_attention": CLASSES,
    "autoencoder/vq_f8": TEXT,
    "conditioner/emoji_clip": EMOJI,
    "conditioner/imagenet_class": CLASSES,
    "conditioner/inpainting": ["+experiment=inpainting_256"],
    "conditioner/layout": ["+experiment=layout_256"],
    "conditioner/none": ["+experiment=ffhq_256"],
    "conditioner/openclip_vit_h14": TEXT,
    "conditioner/semantic_map": ["+experiment=semantic_map_256"],
    "conditioner/super_resolution": ["+experiment=super_resolution_256"],
    "conditioner/text_transformer": ["+experiment=text_256"],
    "diffusion/edm": [*EMOJI, *NO_TERMINAL_SNR, "diffusion.prediction_type=v_prediction"],
    "diffusion/flow": [*EMOJI, *NO_TERMINAL_SNR, "diffusion.prediction_type=flow"],
    "diffusion/ldm": CLASSES,
    "unet/layout": ["+experiment=layout_256"],
    "unet/ldm4_class": CLASSES,
    "unet/ldm4_inpainting": ["+experiment=inpainting_256"],
    "unet/ldm4_semantic_map": ["+experiment=semantic_map_256"],
    "unet/ldm4_super_resolution": ["+experiment=super_resolution_256"],
    "unet/ldm4_unconditional": ["+experiment=ffhq_256"],
    "unet/ldm8_churches": ["+experiment=churches_256"],
    "unet/ldm8_class": [*CLASSES, "autoencoder=kl_f8"],
    # CLIP ViT-L/14, as in Stable Diffusion 1
    "unet/sd1": [
        *TEXT,
        "conditioner.model=ViT-L-14",
        "conditioner.pretrained=openai",
        "conditioner.features=last",
        "conditioner.width=768",
    ],
    "unet/sd2": TEXT,
    "unet/text_1b": ["+experiment=text_256"],
}
"""The experiment that takes a file, and what else it needs; the others fit the emoji experiment."""


@pytest.mark.parametrize("file", FILES)
def test_every_file_passes_the_checks_with_an_experiment(file: str) -> None:
    group, name = file.split("/")
    config = load_config([*FITTING.get(file, EMOJI), f"{group}={name}"])
    assert config.run.experiment


def test_no_experiment_is_named_for_a_file_that_is_gone() -> None:
    assert set(FITTING) <= set(FILES)
