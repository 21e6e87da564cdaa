"""`python -m trainer.evaluate +experiment=NAME`: measure a checkpoint's samples; -m sweeps."""

from trainer.cli import main

if __name__ == "__main__":
    main(
        "trainer.evaluation:evaluate",
        point="trainer.sweep:measure_point",
        summary="trainer.sweep:summarise",
    )
