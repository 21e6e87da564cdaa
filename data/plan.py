"""Which sample at which step: a pure function of (shard sizes, seed, lanes, block, global batch).

It does not know the number of nodes, ranks or workers, so these may change between two steps of
a run and the sequence of global batches stays the same.

Every epoch permutes the shards and cuts their concatenation, from a random sample on, into lanes
of equal length. A lane is cut into blocks, and each block is permuted. A step takes the next few
samples of every lane; a rank takes a slice of the step, hence a few lanes, hence its share of the
shards. Permutations sort raw Philox words (Salmon et al. 2011), whose values numpy guarantees
across versions, as it does not for `Generator.permutation`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_SHARDS, _BLOCKS = 2**32, 2**32 + 1
"""Philox key words of the plan's two kinds of permutation."""


class _Epoch(NamedTuple):
    """The order of the shards in one epoch."""

    shards: Ids
    """Their numbers in the manifest."""
    ends: Ids
    """Running sum of the shards' sizes, in this epoch's order."""
    shifts: Ids
    """What leads from a position in this order to the sample's number, for each shard."""
    rotation: int
    """Where lane 0 begins, so that the samples left over differ even with a single shard."""


class LanePlan:
    """The order of training samples.

    Args:
        sizes: Samples of each shard, in the manifest's order: [shards] int64.
        seed: The run's seed.
        lanes: Independent sequences that are interleaved; divides `global_batch`.
        block: Samples shuffled together within a lane.
        global_batch: Samples a step.

    Raises:
        ValueError: the lanes do not divide the batch, or there are fewer samples than lanes.
    """

    def __init__(self, sizes: Ids, *, seed: int, lanes: int, block: int, global_batch: int) -> None:
        if lanes < 1 or global_batch % lanes:
            raise ValueError(
                f"data.lanes: {lanes} lanes do not divide train.global_batch_size {global_batch}"
            )
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
        """Samples that an epoch skips, fewer than there are lanes; others in the next epoch."""
        return self.samples - self.lane_samples * self.lanes

    def step(self, step: int) -> tuple[Ids, Ids]:
        """Return the samples of a step.

        Returns:
            epoch: [global_batch] int64, which visit of the sample this is.
            index: [global_batch] int64, the sample's number in the manifest's order.
        """
        return self._slice(step, 0, self.global_batch)

    def rank_slice(self, step: int, rank: int, world: int) -> tuple[Ids, Ids]:
        """Return the part of `step` that belongs to a rank: a contiguous slice, [G / world]."""
        if self.global_batch % world:
            raise ValueError(
                f"train.global_batch_size: {self.global_batch} is no multiple of {world} ranks"
            )
        share = self.global_batch // world
        return self._slice(step, rank * share, (rank + 1) * share)

    def substitutes(self, step: int, place: int) -> Iterator[int]:
        """Yield the other samples of the block that holds place `place` of step `step`.

        They come in the block's order from that place on, cyclically, whatever the rank count.
        """
        per_lane = self.global_batch // self.lanes
        lane, offset = divmod(place, per_lane)
        epoch, position = divmod(step * per_lane + offset, self.lane_samples)
        number, slot = divmod(position, self.block)
        order = np.roll(self._block(lane, epoch, number), -slot)[1:]
        yield from self._locate(epoch, lane, number * self.block + order).tolist()

    def shards(self, step: int, rank: int, world: int, *, steps_ahead: int) -> Ids:
        """Return the shards that a rank reads from `step` on, first needed first.

        These are the shards of whole blocks, whose samples may stand in for bad ones: the blocks in
        use, and those that begin within `steps_ahead` steps.
        """
        share, per_lane = self.global_batch // world, self.global_batch // self.lanes
        lanes = np.arange(rank * share // per_lane, -(-(rank + 1) * share // per_lane))
        start, stop = step * per_lane, (step + steps_ahead + 1) * per_lane
        found = []
        while start < stop:
            epoch, position = divmod(start, self.lane_samples)
            first = position // self.block * self.block
            last = min(first + self.block, self.lane_samples) - 1
            found.append(self._shards_between(epoch, lanes * self.lane_samples, first, last))
            start += last + 1 - position
        numbers = np.concatenate(found)
        _, places = np.unique(numbers, return_index=True)
        return numbers[np.sort(places)]

    def _shards_between(self, epoch: int, begins: Ids, first: int, last: int) -> Ids:
        """Return the shards of samples `first` to `last` of the lanes that begin at `begins`."""
        order = self._epoch(epoch)
        begin = (order.rotation + begins + first) % self.samples
        end = begin + last - first
        firsts = np.searchsorted(order.ends, begin, side="right")
        lasts = np.searchsorted(order.ends, end % self.samples, side="right")
        counts = lasts + len(order.ends) * (end // self.samples) - firsts + 1
        skipped = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(firsts - skipped, counts)
        numbers = order.shards[places % len(order.ends)]
        return numbers[self._sizes[numbers] > 0]

    def _slice(self, step: int, start: int, stop: int) -> tuple[Ids, Ids]:
        per_lane = self.global_batch // self.lanes
        epochs, indices = [], []
        for lane in range(start // per_lane, -(-stop // per_lane)):
            low = max(start - lane * per_lane, 0)
            high = min(stop - lane * per_lane, per_lane)
            for epoch, index in self._lane(lane, step * per_lane + low, step * per_lane + high):
                epochs.append(np.full(len(index), epoch, np.int64))
                indices.append(index)
        return np.concatenate(epochs), np.concatenate(indices)

    def _lane(self, lane: int, start: int, stop: int) -> Iterator[tuple[int, Ids]]:
        """Yield a lane's samples from `start` to `stop` of its endless sequence, block by block."""
        while start < stop:
            epoch, position = divmod(start, self.lane_samples)
            number, slot = divmod(position, self.block)
            order = self._block(lane, epoch, number)[slot : slot + stop - start]
            yield epoch, self._locate(epoch, lane, number * self.block + order)
            start += len(order)

    def _locate(self, epoch: int, lane: int, offsets: Ids) -> Ids:
        """Turn offsets in a lane into sample numbers in the manifest's order."""
        order = self._epoch(epoch)
        positions = (order.rotation + lane * self.lane_samples + offsets) % self.samples
        return positions + order.shifts[np.searchsorted(order.ends, positions, side="right")]

    def _epoch(self, epoch: int) -> _Epoch:
        order = self._epochs.get(epoch)
        if order is None:
            order = self._order_shards(epoch)
            # replaced, never changed: a thread that reads ahead may hold the old one
            near = {other: kept for other, kept in self._epochs.items() if abs(other - epoch) < 2}
            self._epochs = near | {epoch: order}
        return order

    def _order_shards(self, epoch: int) -> _Epoch:
        words = _words(self.seed, _SHARDS, epoch, 0, 0, len(self._sizes) + 1)
        order = _permutation(words[1:])
        sizes = self._sizes[order]
        ends = np.cumsum(sizes)
        shifts = self._starts[order]
        shifts -= ends
        shifts += sizes
        return _Epoch(order, ends, shifts, int(words[0] % np.uint64(self.samples)))

    def _block(self, lane: int, epoch: int, number: int) -> Ids:
        """Return the permutation of a block, cached for the one that each lane is in."""
        cached = self._blocks.get(lane)
        if cached is not None and cached[:2] == (epoch, number):
            return cached[2]
        size = min(self.block, self.lane_samples - number * self.block)
        order = _permutation(_words(self.seed, _BLOCKS, epoch, lane, number, size))
        self._blocks[lane] = (epoch, number, order)
        return order


def _words(seed: int, domain: int, epoch: int, lane: int, number: int, count: int) -> NDArray:
    key = [seed % 2**64, domain]
    return np.random.Philox(key=key, counter=[0, number, lane, epoch]).random_raw(count)


def _permutation(words: NDArray[np.uint64]) -> Ids:
    """Order 0 … n-1 by random words, in place: low bits give way to the number they carry."""
    mask = np.uint64((1 << (len(words) - 1).bit_length()) - 1)
    words &= ~mask
    words |= np.arange(len(words), dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)
