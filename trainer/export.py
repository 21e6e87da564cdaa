"""`python -m trainer.export +experiment=NAME`: checkpoint → a folder for diffusers."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.exporting:export")
