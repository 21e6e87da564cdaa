"""Compute the samples of each step from (shard sizes, seed, lanes, block, global batch) alone.

The sequence of global batches does not depend on the number of nodes, ranks or workers. These
numbers may change between two steps of a run.

Every epoch permutes the shards, concatenates them, and cuts the result into lanes of equal length;
the first lane begins at a random sample. A lane is cut into blocks, and each block is permuted. A
step takes the next few samples of every lane. A rank takes a slice of the step: the samples of a
few lanes. A rank therefore reads only a part of the shards.

A permutation is the order of raw Philox words (Salmon et al., Parallel Random Numbers: As Easy as
1, 2, 3, 2011). numpy guarantees the values of these words across versions, but not those of
`Generator.permutation`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from data.order.batches import check_batch
from data.order.plan import Plan
from data.shards.manifest import Ids

_SHARDS, _BLOCKS = 2**32, 2**32 + 1
"""Philox key words of the plan's two kinds of permutation."""


class _Epoch(NamedTuple):
    """The order of the shards in one epoch."""

    shards: Ids
    """[shards], numbers of the shards in the manifest."""
    ends: Ids
    """[shards], running sum of the shards' sizes."""
    shifts: Ids
    """[shards], the number of a sample minus its position in this epoch."""
    rotation: int
    """Position where lane 0 begins. It is random: each epoch then leaves out other samples, also
    with a single shard."""


class LanePlan(Plan):
    """The order of the training samples of one data set.

    sizes: [shards] int64, samples of each shard in the manifest's order. lanes: number of
    independent sequences that are interleaved; must divide global_batch. block: samples of a lane
    that are shuffled together. global_batch: samples of a step.
    Raises: ValueError where the lanes do not divide the batch or outnumber the samples.
    """

    def __init__(self, sizes: Ids, *, seed: int, lanes: int, block: int, global_batch: int) -> None:
        check_batch(global_batch, lanes=lanes)
        if block < 1:
            raise ValueError(f"data.shuffle_block: {block} is not positive")
        self.samples = int(sizes.sum())
        self.lane_samples = self.samples // lanes
        if self.lane_samples == 0:
            raise ValueError(f"data.lanes: {lanes} lanes, but only {self.samples} samples")
        self.seed, self.lanes, self.block, self.global_batch = seed, lanes, block, global_batch
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._epochs: dict[int, _Epoch] = {}
        self._blocks: dict[int, tuple[int, int, Ids]] = {}

    @property
    def left_over(self) -> int:
        """Number of samples that an epoch skips, less than `lanes`; each epoch skips others."""
        return self.samples - self.lane_samples * self.lanes

    def step(self, step: int) -> tuple[Ids, Ids]:
        """Return all samples of a step: epoch and index, each [global_batch] int64."""
        return self._slice(step, 0, self.global_batch)

    @override
    def rank_slice(self, step: int, rank: int, world: int) -> tuple[Ids, Ids]:
        share = self.global_batch // world
        return self._slice(step, rank * share, (rank + 1) * share)

    @override
    def substitutes(self, step: int, place: int) -> Iterator[int]:
        per_lane = self.global_batch // self.lanes
        lane, offset = divmod(place, per_lane)
        epoch, position = divmod(step * per_lane + offset, self.lane_samples)
        number, slot = divmod(position, self.block)
        order = np.roll(self._block(lane, epoch, number), -slot)[1:]
        yield from self._locate(epoch, lane, number * self.block + order).tolist()

    @override
    def shards(self, step: int, rank: int, world: int, *, steps_ahead: int) -> Ids:
        share, per_lane = self.global_batch // world, self.global_batch // self.lanes
        lanes = np.arange(rank * share // per_lane, -(-(rank + 1) * share // per_lane))
        start, stop = step * per_lane, (step + steps_ahead + 1) * per_lane
        found: list[Ids] = []
        while start < stop:
            epoch, position = divmod(start, self.lane_samples)
            first = position // self.block * self.block
            last = min(first + self.block, self.lane_samples) - 1
            found.append(self._shards_between(epoch, lanes * self.lane_samples, first, last))
            start += last + 1 - position
        return without_repeats(np.concatenate(found))

    def _shards_between(self, epoch: int, begins: Ids, first: int, last: int) -> Ids:
        """Return the shards of samples `first` to `last` of the lanes that begin at `begins`."""
        order = self._epoch(epoch)
        begin = (order.rotation + begins + first) % self.samples
        end = begin + last - first
        firsts = np.searchsorted(order.ends, begin, side="right")
        lasts = np.searchsorted(order.ends, end % self.samples, side="right")
        counts = lasts + len(order.ends) * (end // self.samples) - firsts + 1
        skipped = np.cumsum(counts) - counts
        places = np.arange(int(counts.sum())) + np.repeat(firsts - skipped, counts)
        numbers = order.shards[places % len(order.ends)]
        return numbers[self._sizes[numbers] > 0]

    def _slice(self, step: int, start: int, stop: int) -> tuple[Ids, Ids]:
        per_lane = self.global_batch // self.lanes
        epochs: list[Ids] = []
        indices: list[Ids] = []
        for lane in range(start // per_lane, -(-stop // per_lane)):
            low = max(start - lane * per_lane, 0)
            high = min(stop - lane * per_lane, per_lane)
            for epoch, index in self._lane(lane, step * per_lane + low, step * per_lane + high):
                epochs.append(np.full(len(index), epoch, np.int64))
                indices.append(index)
        return np.concatenate(epochs), np.concatenate(indices)

    def _lane(self, lane: int, start: int, stop: int) -> Iterator[tuple[int, Ids]]:
        """Yield (epoch, index [n] int64) for each block of positions `start` to `stop` of a lane.

        Positions count on from epoch to epoch.
        """
        while start < stop:
            epoch, position = divmod(start, self.lane_samples)
            number, slot = divmod(position, self.block)
            order = self._block(lane, epoch, number)[slot : slot + stop - start]
            yield epoch, self._locate(epoch, lane, number * self.block + order)
            start += len(order)

    def _locate(self, epoch: int, lane: int, offsets: Ids) -> Ids:
        """Convert offsets in a lane to sample numbers in the manifest's order."""
        order = self._epoch(epoch)
        positions = (order.rotation + lane * self.lane_samples + offsets) % self.samples
        return positions + order.shifts[np.searchsorted(order.ends, positions, side="right")]

    def _epoch(self, epoch: int) -> _Epoch:
        order = self._epochs.get(epoch)
        if order is None:
            order = self._order_shards(epoch)
            # a new dict: a thread that reads ahead may hold the old one
            near = {other: kept for other, kept in self._epochs.items() if abs(other - epoch) < 2}
            self._epochs = near | {epoch: order}
        return order

    def _order_shards(self, epoch: int) -> _Epoch:
        words = _words(self.seed, _SHARDS, epoch, 0, 0, len(self._sizes) + 1)
        order = permutation(words[1:])
        sizes = self._sizes[order]
        ends = np.cumsum(sizes)
        shifts = self._starts[order]
        shifts -= ends
        shifts += sizes
        return _Epoch(order, ends, shifts, int(words[0] % np.uint64(self.samples)))

    def _block(self, lane: int, epoch: int, number: int) -> Ids:
        """Return the permutation of a block; the latest block of each lane is cached."""
        cached = self._blocks.get(lane)
        if cached is not None and cached[:2] == (epoch, number):
            return cached[2]
        size = min(self.block, self.lane_samples - number * self.block)
        order = permutation(_words(self.seed, _BLOCKS, epoch, lane, number, size))
        self._blocks[lane] = (epoch, number, order)
        return order


def without_repeats(numbers: Ids) -> Ids:
    """Remove the repeats of each number after its first place: [n] → [at most n] int64."""
    _, places = np.unique(numbers, return_index=True)
    return numbers[np.sort(places)]


def _words(
    seed: int, domain: int, epoch: int, lane: int, number: int, count: int
) -> NDArray[np.uint64]:
    key = [seed % 2**64, domain]
    return np.random.Philox(key=key, counter=[0, number, lane, epoch]).random_raw(count)


def permutation(words: NDArray[np.uint64]) -> Ids:
    """Return the numbers 0 to n - 1 in the order of n random words: [n] int64.

    The result overwrites the words. The number of each word replaces its low bits: no two are
    equal then.
    """
    mask = np.uint64((1 << (len(words) - 1).bit_length()) - 1)
    words &= ~mask
    words |= np.arange(len(words), dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)
