"""The model card of an export, in Markdown."""

from pathlib import Path

from data.secrets import redact
from data.shards.manifest import Manifest, ManifestError
from data.text import printable
from trainer.checkpoints.reader import Checkpoint
from trainer.config import Config
from trainer.runs.history import RunFolder, read_run

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

The weights are the exponential moving average. The scale of the latents is part of the 1x1
convolutions of the first stage, and `scaling_factor` is 1.

## Evaluation

{evaluation}
"""


def model_card(config: Config, checkpoint: Checkpoint) -> str:
    """Return the text of the model card: use, data, training and evaluation of the model."""
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
        "images seen": state.images_seen,
        "global batch": config.train.global_batch_size,
        "learning rate": config.optim.peak_lr(config.train.global_batch_size),
        "precision": config.train.precision.value,
        "image size": f"{config.data.image_size} px",
        "prediction type": config.diffusion.prediction_type.value,
        "seed": config.run.seed,
    }
    if run is not None:
        facts |= run.versions
    return redact(
        CARD.format(
            title=printable(f"{config.run.experiment} / {config.run.name}"),
            prompt=printable((config.sample.prompts or config.eval.prompts or ["a picture"])[0]),
            arguments=", ".join(f"{name}={value}" for name, value in arguments.items() if value),
            data=_data(config),
            training="\n".join(f"- {name}: {value}" for name, value in facts.items()),
            evaluation=_evaluation(run, checkpoint.step),
        )
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
        return f"`{config.data.latents}`, which could not be read when this card was written."
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
