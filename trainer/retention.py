"""Which checkpoints stay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import Best, CheckpointConfig

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest `keep`, those at multiples of `keep_every` steps, and the best by one metric."""

    keep: int
    keep_every: int = 0
    best: str = ""
    best_is: Best = Best.lowest

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        """What a run's config says."""
        return cls(config.keep, config.keep_every, config.best, config.best_is)

    def kept(self, measured: Mapping[int, Metrics]) -> set[int]:
        """Steps that stay, of checkpoints given as step → metrics measured at that step."""
        steps = sorted(measured)
        kept = set(steps[-self.keep :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        sign = 1 if self.best_is is Best.lowest else -1
        scores = {step: sign * measured[step].get(self.best, math.nan) for step in steps}
        # of equally good ones the newest
        ranked = sorted((score, -step) for step, score in scores.items() if math.isfinite(score))
        return kept | {-step for _, step in ranked[:1]}


EVERYTHING = Retention(keep=1, keep_every=1)
"""Nothing is ever removed."""
