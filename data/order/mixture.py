"""Mix several data sets in fixed shares of every batch: each lane reads one of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from data.order.batches import check_batch
from data.order.lanes import LanePlan, without_repeats
from data.order.plan import Plan
from data.shards.manifest import ANNOTATED, Ids, Kind, LatentInfo, Manifest, ManifestError
from data.storage.files import local_path


def join_latents(
    folders: Sequence[str], manifests: Sequence[Manifest], weights: Sequence[float]
) -> tuple[str, Manifest]:
    """Describe several sets of latents as one; its shards are those of all sets, in order.

    folders: paths or URLs of the sets. weights: relative shares of the sets.
    Returns the folder that holds all sets, and a manifest with shard names relative to it.
    Raises: ManifestError where the sets differ in kind, or lie in different stores.
    """
    paths = [local_path(folder) for folder in folders]
    if None not in paths:
        folders = [Path(folder).absolute().as_posix() for folder in folders]
    columns = zip(*(folder.split("/") for folder in folders), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    base = "/".join(shared)
    if (None in paths and len(shared) < 3) or any(manifest.base for manifest in manifests):
        raise ManifestError(f"data.mixture: {' and '.join(folders)} must lie in one store")
    shards = [
        replace(shard, name=f"{folder[len(base) + 1 :]}/{shard.name}".removeprefix("/"))
        for folder, manifest in zip(folders, manifests, strict=True)
        for shard in manifest.shards
    ]
    latents = _mix(folders, [manifest.latents for manifest in manifests], weights)
    names = {
        entry: getattr(manifests[0], entry)
        for entry in ("classes", *ANNOTATED)
        if all(getattr(one, entry) == getattr(manifests[0], entry) for one in manifests)
    }
    size = manifests[0].image_size
    joined = Manifest(kind=Kind.latents, shards=shards, image_size=size, latents=latents, **names)
    return base or "/", joined


def _mix(
    folders: Sequence[str], infos: Sequence[LatentInfo | None], weights: Sequence[float]
) -> LatentInfo:
    """Merge the descriptions of the sets; mean and std become those of the mixture."""
    known = [info for info in infos if info is not None]
    if len(known) < len(infos):
        raise ManifestError("data.mixture: a set holds no latents")
    plain = [replace(info, source_hash="", mean=[], std=[]) for info in known]
    for folder, other in zip(folders, plain, strict=True):
        if other != plain[0]:
            raise ManifestError(
                f"data.mixture: the latents in {folder} are of another first stage, text encoder "
                f"or size than those in {folders[0]}"
            )
    shares = np.array(weights) / sum(weights)
    mean = shares @ np.array([info.mean for info in known])
    square = shares @ np.array([np.square(info.std) + np.square(info.mean) for info in known])
    return replace(
        known[0],
        source_hash=" ".join(info.source_hash for info in known),
        mean=mean.tolist(),
        std=np.sqrt(square - mean**2).tolist(),
    )


def share_lanes(weights: Sequence[float], lanes: int) -> NDArray[np.int64]:
    """Assign a data set to each lane, in proportion to the weights, spread evenly: [lanes] int64.

    Lanes are apportioned by largest remainder (Hamilton's method).
    Raises: ValueError where a weight is not positive, or too small for a lane of its own.
    """
    if min(weights) <= 0:
        raise ValueError(f"data.mixture: weights must be positive, not {min(weights)}")
    shares = np.array(weights) / sum(weights) * lanes
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: lanes - counts.sum()]] += 1
    if counts.min() < 1:
        raise ValueError(
            f"data.mixture: set {int(counts.argmin())} gets no lane; its weight needs "
            f"data.lanes={int(np.ceil(lanes / shares.min()))} or so, not {lanes}"
        )
    sets = np.repeat(np.arange(len(counts)), counts)
    set_lanes: list[int] = counts.tolist()
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in set_lanes])
    return sets[np.argsort(places, kind="stable")]


class MixturePlan(Plan):
    """The order of samples of a mixture; every set has its own lanes, blocks and epochs.

    The numbers of the second set's samples follow those of the first.
    sizes: for each set [shards] int64, the samples of its shards. weights: relative shares of the
    sets. lanes: number of lanes of all sets together; must divide global_batch. block: samples of
    a lane that are shuffled together. global_batch: samples of a step.
    Raises: ValueError where the lanes do not divide the batch, or a set has no lane or too few
    samples.
    """

    def __init__(
        self,
        sizes: Sequence[Ids],
        weights: Sequence[float],
        *,
        seed: int,
        lanes: int,
        block: int,
        global_batch: int,
    ) -> None:
        check_batch(global_batch, lanes=lanes)
        self.global_batch = global_batch
        self._per_lane = global_batch // lanes
        self._sets = share_lanes(weights, lanes)
        """[lanes], the set that a lane reads."""
        self._ranks = np.zeros(lanes, np.int64)
        """[lanes], the lane's number among those of its set."""
        self._plans: list[LanePlan] = []
        for number, shards in enumerate(sizes):
            own = np.flatnonzero(self._sets == number)
            self._ranks[own] = np.arange(len(own))
            plan = LanePlan(
                shards,
                seed=seed + number,  # sets of equal sizes must not have the same order
                lanes=len(own),
                block=block,
                global_batch=len(own) * self._per_lane,
            )
            self._plans.append(plan)
        totals = [plan.samples for plan in self._plans]
        self._starts = np.cumsum([0, *totals[:-1]])
        self._first_shards = np.cumsum([0, *map(len, sizes)])

    @override
    def rank_slice(self, step: int, rank: int, world: int) -> tuple[Ids, Ids]:
        share = self.global_batch // world
        start, stop = rank * share, (rank + 1) * share
        first = start // self._per_lane
        lanes = [self._lane(step, lane) for lane in range(first, -(-stop // self._per_lane))]
        part = slice(start - first * self._per_lane, stop - first * self._per_lane)
        epochs, indices = zip(*lanes, strict=True)
        return np.concatenate(epochs)[part], np.concatenate(indices)[part]

    @override
    def substitutes(self, step: int, place: int) -> Iterator[int]:
        lane, offset = divmod(place, self._per_lane)
        number = int(self._sets[lane])
        start = self._starts[number]
        own_place = int(self._ranks[lane]) * self._per_lane + offset
        for sample in self._plans[number].substitutes(step, own_place):
            yield int(start + sample)

    @override
    def shards(self, step: int, rank: int, world: int, *, steps_ahead: int) -> Ids:
        share = self.global_batch // world
        lanes = range(rank * share // self._per_lane, -(-(rank + 1) * share // self._per_lane))
        found: list[Ids] = []
        for lane in lanes:
            number = int(self._sets[lane])
            plan = self._plans[number]
            own = plan.shards(step, int(self._ranks[lane]), plan.lanes, steps_ahead=steps_ahead)
            found.append(own + self._first_shards[number])
        return without_repeats(np.concatenate(found))

    def _lane(self, step: int, lane: int) -> tuple[Ids, Ids]:
        number = int(self._sets[lane])
        plan = self._plans[number]
        epoch, index = plan.rank_slice(step, int(self._ranks[lane]), plan.lanes)
        return epoch, index + self._starts[number]
