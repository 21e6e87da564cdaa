"""Compute the features of training images that evaluations compare with.

Examples:
    python -m trainer.reference +experiment=emoji
    torchrun --nproc-per-node=8 -m trainer.reference +experiment=laion_512
"""

from trainer.cli import main

OPTIONS = "eval data.dir data.train data.image_size data.cache"

if __name__ == "__main__":
    main("trainer.reference.job:make_references", about=__doc__, options=OPTIONS)
