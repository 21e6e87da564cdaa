"""`python -m trainer.reference +experiment=NAME`: features of real images, made once for all."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.evaluation:make_references")
