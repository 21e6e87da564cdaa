"""`python -m trainer +experiment=NAME`: train, or go on from the last checkpoint."""

import signal

from trainer.cli import main

if __name__ == "__main__":
    # Slurm's warning may come before trainer.preemption listens, in seconds of imports: it waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    main("trainer.loop:fit")
