"""Draw images of prompts.

Examples:
    python -m trainer.sample +experiment=emoji "sample.prompts=[a strawberry, red heart]"
    torchrun --nproc-per-node=8 -m trainer.sample +experiment=laion_512 sample.prompts_file=FILE
"""

from trainer.cli import main

OPTIONS = "sample sampler run checkpoint.load ema.use"

if __name__ == "__main__":
    main("trainer.sample.job:draw", about=__doc__, options=OPTIONS)
