"""`python -m trainer +experiment=NAME`: train, or go on from the last checkpoint."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.loop:fit")
