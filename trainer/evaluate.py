"""`python -m trainer.evaluate +experiment=NAME`: measure a checkpoint's samples."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.evaluation:evaluate")
