"""Compute an average of another width from a run's snapshots.

Examples:
    python -m trainer.ema +experiment=emoji run.name=widths ema.reconstruct.sigma_rel=0.15
"""

from trainer.cli import main

OPTIONS = "ema.reconstruct run"

if __name__ == "__main__":
    main("trainer.ema.job:reconstruct", about=__doc__, options=OPTIONS)
