"""Train a small CLIP on the packed images of an experiment.

Examples:
    python -m trainer.clip +experiment=emoji
    python -m trainer.clip +experiment=emoji clip.out=FILE
"""

from trainer.cli import main

OPTIONS = """
    clip conditioner.model data.dir data.train data.val
    data.image_size data.captions data.caption_fields[] data.encoding data.cache run.seed
"""

if __name__ == "__main__":
    main("trainer.clip.job:train_clip", about=__doc__, options=OPTIONS)
