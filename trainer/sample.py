"""`python -m trainer.sample +experiment=NAME`: prompts → images."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.sampling:draw")
