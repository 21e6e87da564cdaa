"""A trained text-to-image model as a folder that diffusers loads, with a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from data.manifest import Manifest, ManifestError
from models.autoencoder import load_autoencoder
from models.conditioners import ClipText, build_conditioner
from models.diffusers_format import (
    DIFFUSION_WEIGHTS,
    PIPELINE,
    PIPELINE_INDEX,
    autoencoder_config,
    scaled_autoencoder,
    scheduler_config,
    text_encoder_config,
    text_encoder_weights,
    tokenizer_files,
    unet_config,
)
from trainer.checkpoint import Checkpoint, chosen_checkpoint
from trainer.config import Config
from trainer.pipeline import load_trained
from trainer.run_folder import RunFolder, read_run

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---
# {title}

A latent diffusion model (Rombach et al. 2022), trained from scratch with Latent Foundry.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(".")
image = pipeline({prompt!r}, {arguments}).images[0]
```

## Data

{data}

## Training

{training}

The weights are the exponential moving average. The first stage is scaled: what it encodes to and
decodes from has mean 0 and variance 1 in every latent channel, as the U-Net wants it; the scale is
part of its 1x1 convolutions, so that `scaling_factor` is 1.

## Evaluation

{evaluation}
"""


def export(config: Config) -> None:
    """Write the averaged weights of checkpoint.load, or of the run's newest checkpoint.

    Raises: FileNotFoundError or ValueError naming what is missing or cannot be exported.
    """
    side = config.data.image_size
    configs = {
        "unet": unet_config(config.unet, side // config.autoencoder.downsample_factor),
        "vae": autoencoder_config(config.autoencoder, side),
        "scheduler": scheduler_config(config.diffusion, config.sampler),
    }
    checkpoint = chosen_checkpoint(config)
    text = build_conditioner(config.conditioner)
    if not isinstance(text, ClipText):
        raise ValueError(
            f"conditioner.kind={config.conditioner.kind}: only models of conditioner.kind=text can "
            f"be exported; diffusers has no pipeline for others"
        )
    module, scale = load_trained(config, checkpoint, text)
    first_stage = load_autoencoder(config.autoencoder).state_dict()

    folder = Path(config.export.out)
    if folder.exists() and not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"export.out: {folder} exists and is no export: choose another")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _write_json(part / "unet" / "config.json", configs["unet"])
    _write_tensors(part / "unet" / DIFFUSION_WEIGHTS, module.unet.state_dict())
    _write_json(part / "vae" / "config.json", configs["vae"])
    scaled = scaled_autoencoder(first_stage, scale.mean, scale.std)
    _write_tensors(part / "vae" / DIFFUSION_WEIGHTS, scaled)
    _write_json(part / "text_encoder" / "config.json", text_encoder_config(text))
    _write_tensors(part / "text_encoder" / "model.safetensors", text_encoder_weights(text))
    for name, content in tokenizer_files(text).items():
        _write_text(part / "tokenizer" / name, content)
    _write_json(part / "scheduler" / "scheduler_config.json", configs["scheduler"])
    scheduler = ["diffusers", configs["scheduler"]["_class_name"]]
    _write_json(part / PIPELINE_INDEX, PIPELINE | {"scheduler": scheduler})
    _write_text(part / "README.md", model_card(config, checkpoint))
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    print(f"step {checkpoint.step} for diffusers, with a model card: {folder}")


def model_card(config: Config, checkpoint: Checkpoint) -> str:
    """What the model is, how to use it, what it was trained on, and how good it is."""
    sampler, state = config.sampler, checkpoint.state
    arguments = {
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "guidance_rescale": sampler.guidance_rescale,
        "eta": sampler.eta,
    }
    run = _run(config)
    facts = {
        "optimizer steps": checkpoint.step,
        "images seen": state["images_seen"],
        "global batch": config.train.global_batch_size,
        "learning rate": config.optim.lr,
        "precision": config.train.precision.value,
        "image size": f"{config.data.image_size} px",
        "prediction type": config.diffusion.prediction_type.value,
        "seed": config.run.seed,
    }
    if run is not None:
        facts |= run.versions
    return CARD.format(
        title=f"{config.run.experiment} / {config.run.name}",
        prompt=(config.sample.prompts or config.eval.prompts or ["a picture"])[0],
        arguments=", ".join(f"{name}={value}" for name, value in arguments.items() if value),
        data=_data(config),
        training="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        evaluation=_evaluation(run, checkpoint.step),
    )


def _run(config: Config) -> RunFolder | None:
    try:
        return read_run(Path(config.run.dir))
    except (FileNotFoundError, ValueError):
        return None


def _data(config: Config) -> str:
    try:
        manifest = Manifest.load(config.data.latents, option="data.latents")
    except ManifestError:
        return f"`{config.data.latents}`, which was not at hand when this card was written."
    licence = manifest.licence or "The data set states no licence."
    return f"{manifest.samples:,} images with captions (`{manifest.hash[:12]}`). {licence}"


def _evaluation(run: RunFolder | None, step: int) -> str:
    found: dict[int, list[str]] = {}
    for key, series in sorted(run.series.items() if run else ()):
        measured = [number for number in series if number <= step]
        if key.startswith("eval/") and measured:
            last = max(measured)
            found.setdefault(last, []).append(f"- {key.removeprefix('eval/')}: {series[last]:.6g}")
    if not found:
        return "None was logged."
    last = max(found)
    return "\n".join([f"Averaged weights at step {last}:", "", *found[last]])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
