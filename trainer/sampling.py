"""Drawing images for people: prompts in, PNGs and a contact sheet out."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.codecs import BadSampleError, decode_image
from data.transforms import square
from models.samplers import num_steps
from trainer.checkpoint import chosen_checkpoint
from trainer.config import Config, SampleConfig
from trainer.contact_sheet import contact_sheet
from trainer.distributed import Ranks, join
from trainer.images import save_picture, save_png
from trainer.pipeline import Pipeline

SHEET_IMAGES = 400
"""The first of more images are on the contact sheet."""


def draw(config: Config) -> None:
    """Draw sample.images_per_prompt images of each prompt, spread over the ranks.

    Image i, a PNG with its parameters in its metadata, is of prompt i modulo their number, so that
    more images a prompt leave the first ones as they are.
    Raises: ValueError naming sample.prompts, sample.export or checkpoint.load where there is
    nothing to draw, and sample.init_image where it is no picture.
    """
    options = config.sample
    prompts = read_prompts(options) * options.images_per_prompt
    image = read_image(options.init_image, config.data.image_size) if options.init_image else None
    strength = 1.0 if image is None else options.strength
    ranks = join()
    pipeline, about = _load(config, ranks)
    about |= _parameters(config)
    folder, parts = Path(options.out), list(ranks.parts(len(prompts), options.batch_size))
    total = sum(map(len, parts)) * num_steps(config.sampler, strength)
    hidden = None if ranks.is_main else True
    with tqdm(total=total, desc="sampling", unit="image step", disable=hidden) as bar:
        for part in parts:
            images = pipeline.draw(
                [prompts[number] for number in part],
                part,
                options.seed,
                lambda _, latents: _advance(bar, len(latents)),
                negative_prompt=options.negative_prompt or None,
                init_image=image,
                strength=strength,
            )
            for number, drawn in zip(part, images, strict=True):
                facts = {"prompt": prompts[number], "sample": number, **about}
                save_png(_path(folder, number), drawn, facts)
    ranks.barrier()
    if ranks.is_main:
        sheet = _sheet(folder, prompts, options, about)
        print(f"{len(prompts)} images in {folder}; at a glance: {sheet}")


def read_prompts(options: SampleConfig) -> list[str]:
    """sample.prompts, then the lines of sample.prompts_file.

    Raises: ValueError naming the option where there are none.
    """
    prompts = list(options.prompts)
    if options.prompts_file:
        try:
            lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"sample.prompts_file: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            "no prompts: give \"sample.prompts=['a red apple','a blue fish']\", or a file with one "
            "prompt a line as sample.prompts_file"
        )
    return prompts


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


def _load(config: Config, ranks: Ranks) -> tuple[Pipeline, dict[str, object]]:
    """The pipeline, and what it was loaded from."""
    if config.sample.export:
        folder = Path(config.sample.export)
        return Pipeline.load_export(config, folder, ranks.device), {"export": str(folder)}
    checkpoint = chosen_checkpoint(config)
    source: dict[str, object] = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
    return Pipeline.load(config, checkpoint, ranks.device), source


def _parameters(config: Config) -> dict[str, object]:
    """What all images have in common, for their metadata."""
    options, sampler = config.sample, config.sampler
    found: dict[str, object] = {
        "seed": options.seed,
        "sampler": str(sampler.name),
        "sampler_steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
    }
    if options.negative_prompt:
        found["negative_prompt"] = options.negative_prompt
    if options.init_image:
        found |= {"init_image": options.init_image, "strength": options.strength}
    return found


def _sheet(
    folder: Path, prompts: list[str], options: SampleConfig, about: dict[str, object]
) -> Path:
    """All images under their prompts, those of one prompt side by side."""
    different = len(prompts) // options.images_per_prompt
    order = sorted(range(len(prompts)), key=lambda number: number % different)[:SHEET_IMAGES]
    pictures = []
    for number in order:
        with Image.open(_path(folder, number)) as image:
            pictures.append((image.copy(), prompts[number]))
    path = folder / "sheet.png"
    save_picture(path, contact_sheet(pictures), {"prompts": prompts[:different], **about})
    return path


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _advance(bar: tqdm, images: int) -> None:
    bar.update(images)
