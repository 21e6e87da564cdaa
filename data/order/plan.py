"""The interface of plans: the order of the training samples."""

from collections.abc import Iterator
from typing import Protocol

from data.shards.manifest import Ids


class Plan(Protocol):
    """An order of training samples; the global batches are the same for any number of ranks."""

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[Ids, Ids]:
        """Return a rank's contiguous slice of a global batch: (epoch, index).

        world: number of ranks, which must divide the global batch (`Share` checks it).
        epoch: [global_batch / world] int64, the number of the visit to the sample.
        index: [global_batch / world] int64, the number of the sample in the manifest's order.
        """
        ...

    def substitutes(self, step: int, place: int) -> Iterator[int]:
        """Yield the numbers of the other samples in the block of one sample of a step.

        place: position of that sample in the global batch. The block is read from there on,
        cyclically. The result is the same for any number of ranks.
        """
        ...

    def shards(self, step: int, rank: int, world: int, *, steps_ahead: int) -> Ids:
        """Return the numbers of the shards that a rank reads from `step` on, in order of need.

        The shards [n] int64 are those of whole blocks, because any sample of a block may replace a
        bad one: of the blocks in use, and of those that begin within `steps_ahead` steps.
        """
        ...
