"""Write a checkpoint as a folder that diffusers loads, with a model card.

Examples:
    python -m trainer.export +experiment=emoji
    python -m trainer.export +experiment=emoji checkpoint.load=FOLDER export.out=FOLDER
"""

from trainer.cli import main

OPTIONS = "export run checkpoint.load ema.use sampler"

if __name__ == "__main__":
    main("trainer.export.job:export", about=__doc__, options=OPTIONS)
