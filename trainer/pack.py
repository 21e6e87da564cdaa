"""`python -m trainer.pack +experiment=NAME`: raw images and captions → image shards."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.packing:pack")
