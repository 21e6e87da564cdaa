"""Write a text-to-image model as a folder that diffusers loads, with a model card."""

from pathlib import Path
from typing import Any

import safetensors.torch

from data.storage.atomic import atomic_folder, remove_leftovers
from data.storage.lease import NAME, take
from models.conditioning.conditioner import PipelinePart
from models.conditioning.conditioners import build_conditioner
from models.diffusers_format import (
    PIPELINE_INDEX,
    autoencoder_config,
    diffusers_part,
    pipeline_index,
    scaled_autoencoder,
    scheduler_config,
    unet_config,
)
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.config import Config
from trainer.export.card import model_card
from trainer.pipeline import load_decoder, load_trained

_safetensors: Any = safetensors.torch  # its types are incomplete


def export(config: Config) -> None:
    """Export the averaged weights of checkpoint.load, or of the run's newest checkpoint.

    Raises: FileNotFoundError or ValueError that names the option which is missing or which
    diffusers does not support.
    """
    side = config.data.image_size
    configs = {
        "unet": unet_config(config.unet, side // config.autoencoder.downsample_factor),
        "vae": autoencoder_config(config.autoencoder, side),
        "scheduler": scheduler_config(config.diffusion, config.sampler),
    }
    conditioner = build_conditioner(config.conditioner)
    condition_parts = conditioner.pipeline_parts()
    if condition_parts is None:
        raise ValueError(
            f"conditioner.kind={config.conditioner.kind}: diffusers has no pipeline for such a "
            f"condition; only models of conditioner.kind=text can be exported"
        )
    checkpoint = chosen_checkpoint(config)
    module, scale = load_trained(config, checkpoint, conditioner)
    first_stage = load_decoder(config, checkpoint).state_dict()
    weights = {
        "unet": module.unet.state_dict(),
        "vae": scaled_autoencoder(first_stage, **scale.values),
    }
    parts = {name: diffusers_part(configs[name], weights.get(name)) for name in configs}
    parts |= condition_parts

    folder = Path(config.export.out)
    if folder.exists() and not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"export.out: {folder} exists and is no export: choose another")
    lease = folder.with_name(f".{folder.name}{NAME}")  # beside it: the folder is replaced whole
    with take(lease, "choose another export.out"):
        remove_leftovers(folder)
        with atomic_folder(folder) as written:
            for name, part in parts.items():
                _write_part(written / name, part)
            (written / PIPELINE_INDEX).write_text(pipeline_index(parts), encoding="utf-8")
            (written / "README.md").write_text(model_card(config, checkpoint), encoding="utf-8")
    print(f"step {checkpoint.step} for diffusers, with a model card: {folder}")


def _write_part(folder: Path, part: PipelinePart) -> None:
    folder.mkdir(parents=True)
    for name, content in part.texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    for name, tensors in part.tensors.items():
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        _safetensors.save_file(whole, folder / name, metadata={"format": "pt"})
