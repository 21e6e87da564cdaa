"""Draw images of prompts into PNG files and a contact sheet."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from data.shards.codecs import MAX_IMAGE_BYTES, BadSampleError, decode_image
from data.storage.untrusted import read_file
from models.conditioning.conditioner import Size
from models.conditioning.given import Given
from models.config import ConditionerKind
from models.diffusion.samplers import num_steps
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.config import Config, SampleConfig
from trainer.pictures.png import read_about, save_picture, save_png, to_uint8
from trainer.pictures.sheets import contact_sheet
from trainer.pipeline import Pipeline
from trainer.runs.data_set import numbers_of, read_classes
from trainer.runs.paths import SAMPLES, step_name
from trainer.runtime.ranks import Ranks, join
from trainer.sample.conditions import (
    FileCondition,
    check_files,
    joined,
    read_conditions,
    same_sizes,
)

SHEET_IMAGES = 400
"""Most images on the contact sheet."""
MAX_PROMPTS_BYTES = 2**26


def draw(config: Config) -> None:
    """Draw sample.images_per_prompt images of each prompt or condition, spread over the ranks.

    Image i has prompt number i modulo the number of prompts; therefore more images per prompt do
    not change the first images. Each is a PNG file with its parameters as metadata.
    Raises: ValueError or FileNotFoundError that names sample.prompts, sample.export,
    checkpoint.load, sample.init_image, the files of conditions, or sample.out.
    """
    options, kind = config.sample, config.conditioner.kind
    check_files(config)
    conditions = read_conditions(config)
    prompts = _titles(config, conditions) * options.images_per_prompt
    captions = prompts
    if kind is ConditionerKind.class_label:
        captions = numbers_of(prompts, read_classes(Path(config.run.dir)))
    size = options.height or config.data.image_size, options.width or config.data.image_size
    image = read_image(options.init_image, size) if options.init_image else None
    strength = 1.0 if image is None else options.strength
    ranks = join()
    pipeline, about = _load(config, ranks)
    about |= _parameters(config)
    folder = folder_of(config, prompts, about)
    parts = list(ranks.parts(len(prompts), options.batch_size))
    total = sum(map(len, parts)) * num_steps(config.sampler, strength)
    hidden = None if ranks.is_main else True
    with tqdm(total=total, desc="sampling", unit="image step", disable=hidden) as bar:
        for part, given, one in _givens(parts, captions, conditions):
            images = pipeline.draw(
                given,
                part,
                options.seed,
                lambda _, latents: _advance(bar, len(latents)),
                size=size if one is None else one.padded,
                negative_prompt=options.negative_prompt or None,
                init_image=image,
                strength=strength,
            )
            for number, drawn in zip(part, images, strict=True):
                facts = {"prompt": prompts[number], "sample": number, **about}
                save_png(_path(folder, number), drawn if one is None else one.cut(drawn), facts)
    ranks.barrier()
    if ranks.is_main:
        for number, condition in enumerate(conditions):
            size = pipeline.latent_size(condition.padded)
            shown = to_uint8(pipeline.conditioner.picture(condition.given, size))[0]
            save_png(_condition_path(folder, number), condition.cut(shown))
        sheet = _sheet(folder, prompts, len(conditions), options, about)
        print(f"{len(prompts)} images in {folder}; contact sheet: {sheet}")


def _titles(config: Config, conditions: Sequence[FileCondition]) -> list[str]:
    """Return the prompts, or the names of conditions from files."""
    if conditions:
        return [condition.name for condition in conditions]
    if config.conditioner.kind is ConditionerKind.none and not config.sample.prompts_file:
        return list(config.sample.prompts) or [""]
    return read_prompts(config.sample)


def _givens(
    parts: Sequence[Sequence[int]], captions: list[str], conditions: Sequence[FileCondition]
) -> Iterator[tuple[Sequence[int], Given, FileCondition | None]]:
    """Yield numbers of samples, their conditions, and one of these for the sizes."""
    for part in parts:
        if not conditions:
            yield part, Given([captions[number] for number in part]), None
            continue
        for run in same_sizes(part, conditions):
            own = [conditions[number % len(conditions)] for number in run]
            yield run, joined(own), own[0]


def read_prompts(options: SampleConfig) -> list[str]:
    """Return sample.prompts, then the lines of sample.prompts_file.

    Raises: ValueError that names the option, if there is no prompt or the file cannot be read.
    """
    prompts = list(options.prompts)
    if options.prompts_file:
        try:
            content = read_file(Path(options.prompts_file), limit=MAX_PROMPTS_BYTES)
            lines = content.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"sample.prompts_file: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            "no prompts: give \"sample.prompts=['a red apple','a blue fish']\", or a file with one "
            "prompt a line as sample.prompts_file"
        )
    return prompts


def read_image(path: str, size: Size) -> Tensor:
    """Read the centre of a PNG, JPEG or WebP picture, resized to (H, W): [3, H, W] in [-1, 1].

    Raises: ValueError that names sample.init_image, if there is no picture.
    """
    try:
        picture = decode_image(read_file(Path(path), limit=MAX_IMAGE_BYTES))
    except OSError as error:
        raise ValueError(f"sample.init_image: {error}") from error
    except BadSampleError as error:
        raise ValueError(f"sample.init_image: {path}: {error}") from error
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(fitted)).permute(2, 0, 1) / 127.5 - 1.0


def _load(config: Config, ranks: Ranks) -> tuple[Pipeline, dict[str, object]]:
    """Load the pipeline; return it with the source of its weights, for the metadata."""
    if config.sample.export:
        folder = Path(config.sample.export)
        return Pipeline.load_export(config, folder, ranks.device), {"export": str(folder)}
    checkpoint = chosen_checkpoint(config, ranks)
    source: dict[str, object] = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
    return Pipeline.load(config, checkpoint, ranks.device), source


def _parameters(config: Config) -> dict[str, object]:
    """Return the parameters that all images share, for the metadata."""
    options, sampler = config.sample, config.sampler
    found: dict[str, object] = {
        "seed": options.seed,
        "sampler": str(sampler.name),
        "sampler_steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
    }
    if options.height or options.width:
        found |= {"height": options.height, "width": options.width}
    if options.negative_prompt:
        found["negative_prompt"] = options.negative_prompt
    if options.init_image:
        found |= {"init_image": options.init_image, "strength": options.strength}
    return found


def folder_of(config: Config, prompts: list[str], about: Mapping[str, object]) -> Path:
    """Return sample.out, or a folder for this draw alone; the images of two runs do not mix.

    Raises: ValueError if sample.out holds images of another run.
    """
    if not config.sample.out:
        drawn = json.dumps([dict(about), list(dict.fromkeys(prompts))])
        digest = hashlib.sha256(drawn.encode()).hexdigest()[:8]
        step = about.get("step")
        name = step_name(step) if isinstance(step, int) else "export"
        return Path(config.run.dir) / SAMPLES / f"{name}_{digest}"
    folder = Path(config.sample.out)
    first = _path(folder, 0)
    if first.exists():
        other = read_about(first)
        if _source(other) != _source(about):
            raise ValueError(
                f"sample.out: {folder} holds images of {_source(other) or 'an unknown source'}, "
                f"not of {_source(about)}: choose another folder"
            )
    return folder


def _source(about: Mapping[str, object]) -> str:
    """Return the folder of the checkpoints, or of the export, that drew an image."""
    if "export" in about:
        return os.path.realpath(str(about["export"]))
    return os.path.realpath(Path(str(about["checkpoint"])).parent) if "checkpoint" in about else ""


def _sheet(
    folder: Path,
    prompts: list[str],
    conditions: int,
    options: SampleConfig,
    about: dict[str, object],
) -> Path:
    """Write a sheet of the first SHEET_IMAGES images, ordered by prompt; return its path.

    Each condition from a file is shown before its images.
    """
    different = len(prompts) // options.images_per_prompt
    order = sorted(range(len(prompts)), key=lambda number: number % different)[:SHEET_IMAGES]
    pictures: list[tuple[Image.Image, str]] = []
    for number in order:
        if number < conditions:
            pictures.append((_open(_condition_path(folder, number)), "condition"))
        pictures.append((_open(_path(folder, number)), prompts[number]))
    path = folder / "sheet.png"
    save_picture(path, contact_sheet(pictures), {"prompts": prompts[:different], **about})
    return path


def _open(path: Path) -> Image.Image:
    return decode_image(read_file(path, limit=MAX_IMAGE_BYTES, below=path.parent))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _condition_path(folder: Path, number: int) -> Path:
    return folder / f"condition_{number:05d}.png"


def _advance(bar: "tqdm[NoReturn]", images: int) -> None:
    bar.update(images)
