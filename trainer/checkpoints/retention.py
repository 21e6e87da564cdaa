"""Retention: the choice of the checkpoints to keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import Best, CheckpointConfig

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retention:
    """A rule that keeps the newest checkpoints, those at regular steps, and the best one.

    keep: number of newest ones; keep_every: interval of the regular ones in steps, 0 for none;
    best: metric of the best one, empty for none.
    """

    keep: int
    keep_every: int = 0
    best: str = ""
    best_is: Best = Best.lowest

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        """Make the rule of a run's config."""
        return cls(config.keep, config.keep_every, config.best, config.best_is)

    def largest(self, every: int, last_step: int) -> int:
        """Return the largest number of checkpoints that stay in a run.

        every: steps between checkpoints. last_step: the step of the last checkpoint.
        """
        saved = -(-last_step // every)
        regular = last_step // math.lcm(every, self.keep_every) if self.keep_every else 0
        return min(saved, self.keep + regular + bool(self.best))

    def kept(self, measured: Mapping[int, Metrics]) -> set[int]:
        """Return the steps to keep; measured: step of each checkpoint → metrics at that step."""
        steps = sorted(measured)
        kept = set(steps[-self.keep :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        sign = 1 if self.best_is is Best.lowest else -1
        scores = {step: sign * measured[step].get(self.best, math.nan) for step in steps}
        # of equally good ones the newest is the best
        ranked = sorted((score, -step) for step, score in scores.items() if math.isfinite(score))
        return kept | {-step for _, step in ranked[:1]}


EVERYTHING = Retention(keep=1, keep_every=1)
"""The rule that keeps every checkpoint."""
