"""Drawing images for people: prompts in, PNGs and a contact sheet out."""

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.codecs import BadSampleError, decode_image
from data.transforms import square
from models.samplers import num_steps
from trainer.checkpoint import chosen_checkpoint
from trainer.config import Config
from trainer.distributed import join
from trainer.images import grid, save_png
from trainer.pipeline import Pipeline


def draw(config: Config) -> None:
    """Draw one image for each of sample.prompts with seeds counting up from sample.seed.

    Raises: ValueError naming sample.prompts or checkpoint.load where there is nothing to draw,
    and sample.init_image where it is no picture.
    """
    options, prompts = config.sample, config.sample.prompts
    if not prompts:
        raise ValueError("sample.prompts is empty: sample.prompts=['a red apple','a blue fish']")
    image = read_image(options.init_image, config.data.image_size) if options.init_image else None
    checkpoint = chosen_checkpoint(config)
    pipeline = Pipeline.load(config, checkpoint, join().device)
    folder = Path(options.out)
    strength = 1.0 if image is None else options.strength
    steps = num_steps(config.sampler, strength)
    with tqdm(total=steps, desc="sampling", unit="step", disable=None) as bar:
        images = pipeline.draw(
            prompts,
            range(len(prompts)),
            options.seed,
            lambda step, _: _advance(bar),
            negative_prompt=options.negative_prompt or None,
            init_image=image,
            strength=strength,
        )
    about = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "seed": options.seed,
        "sampler": str(config.sampler.name),
        "sampler_steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
    }
    if options.negative_prompt:
        about["negative_prompt"] = options.negative_prompt
    if options.init_image:
        about |= {"init_image": options.init_image, "strength": strength}
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        facts = {"prompt": prompt, "sample": number, **about}
        save_png(folder / f"{number:04d}.png", image, facts)
    sheet = folder / "sheet.png"
    columns = min(8, math.ceil(math.sqrt(len(prompts))))
    save_png(sheet, grid(images, columns), {"prompts": list(prompts), **about})
    print(f"{len(prompts)} images in {folder}; all of them: {sheet}")


def read_image(path: str, size: int) -> Tensor:
    """The centre of a PNG, JPEG or WebP picture: [3, size, size] in [-1, 1].

    Raises: ValueError naming sample.init_image where there is none.
    """
    try:
        pixels = square(decode_image(Path(path).read_bytes()), size)
    except OSError as error:
        raise ValueError(f"sample.init_image: {error}") from error
    except BadSampleError as error:
        raise ValueError(f"sample.init_image: {path}: {error}") from error
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1.0


def _advance(bar: tqdm) -> None:
    bar.update()
