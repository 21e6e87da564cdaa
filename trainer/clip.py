"""`python -m trainer.clip +experiment=NAME`: train the text encoder that an experiment ships."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.contrastive:train_clip")
