"""`python -m trainer.ema +experiment=NAME ema.reconstruct.sigma_rel=0.1`: another average."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.posthoc:reconstruct")
