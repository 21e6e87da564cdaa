"""`python -m trainer.precompute +experiment=NAME`: image shards → latent shards."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.latents:precompute")
