"""Drawing images for people: prompts in, PNGs and a contact sheet out."""

import math
from pathlib import Path

from tqdm import tqdm

from trainer.checkpoint import chosen_checkpoint
from trainer.config import Config
from trainer.distributed import join
from trainer.images import grid, save_png
from trainer.pipeline import Pipeline


def draw(config: Config) -> None:
    """Draw one image for each of sample.prompts with seeds counting up from sample.seed.

    Raises: ValueError naming sample.prompts or checkpoint.load where there is nothing to draw.
    """
    prompts = config.sample.prompts
    if not prompts:
        raise ValueError("sample.prompts is empty: sample.prompts=['a red apple','a blue fish']")
    checkpoint = chosen_checkpoint(config)
    pipeline = Pipeline.load(config, checkpoint, join().device)
    folder = Path(config.sample.out)
    with tqdm(total=config.sampler.steps, desc="sampling", unit="step", disable=None) as bar:
        images = pipeline.draw(
            prompts, range(len(prompts)), config.sample.seed, lambda step, _: _advance(bar)
        )
    about = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "seed": config.sample.seed,
        "sampler": str(config.sampler.name),
        "sampler_steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
    }
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        facts = {"prompt": prompt, "sample": number, **about}
        save_png(folder / f"{number:04d}.png", image, facts)
    sheet = folder / "sheet.png"
    columns = min(8, math.ceil(math.sqrt(len(prompts))))
    save_png(sheet, grid(images, columns), {"prompts": list(prompts), **about})
    print(f"{len(prompts)} images in {folder}; all of them: {sheet}")


def _advance(bar: tqdm) -> None:
    bar.update()
