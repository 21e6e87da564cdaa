"""`python -m trainer.plan +experiment=NAME`: memory, time and cost before a run, without a GPU."""

from trainer.cli import main

if __name__ == "__main__":
    main("trainer.planning:plan")
