"""Measure the samples of a checkpoint, or the images of a folder.

Examples:
    python -m trainer.evaluate +experiment=emoji
    python -m trainer.evaluate +experiment=emoji eval.images=FOLDER
    torchrun --nproc-per-node=8 -m trainer.evaluate +experiment=laion_512 checkpoint.load=FOLDER
    python -m trainer.evaluate -m +experiment=emoji sampler=ddim,dpmpp_2m sampler.steps=10,20,50
"""

from trainer.cli import main

OPTIONS = """
    run checkpoint.load ema.use eval sampler data.dir data.train data.val
    data.image_size data.captions data.caption_fields[] data.encoding data.cache logger.wandb
"""

if __name__ == "__main__":
    main(
        "trainer.evaluate.job:evaluate",
        about=__doc__,
        options=OPTIONS,
        point="trainer.evaluate.sweep:measure_point",
        summary="trainer.evaluate.sweep:summarise",
    )
