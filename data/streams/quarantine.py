"""Record the bad samples that are found during reading, each of them once."""

from collections.abc import Iterable

from data.shards.manifest import Rejected


class Quarantine:
    """Bad samples by shard and key, in the order in which they were found.

    Ranks exchange their bad samples: `fresh` returns the new ones of this rank, and `add` takes
    those of the others. All ranks then have the same record.
    samples: number of samples of the data set. max_share: largest share of bad samples. option:
    config path of the data set, for the error.
    """

    def __init__(self, samples: int, max_share: float, option: str) -> None:
        self._samples, self._limit, self._option = samples, max_share * samples, option
        self._ledger: dict[tuple[str, str], Rejected] = {}
        self._fresh: list[Rejected] = []

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def rejected(self) -> list[Rejected]:
        """All bad samples."""
        return list(self._ledger.values())

    def record(self, rejected: Iterable[Rejected]) -> None:
        """Record bad samples that this rank has found.

        Raises: ValueError where there are more than data.max_rejected_share allows.
        """
        for item in rejected:
            if (item.shard, item.key) not in self._ledger:
                self._fresh.append(item)
            self.add([item])

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Add bad samples of another rank, or of the checkpoint that the run goes on from.

        Raises: ValueError where there are more than data.max_rejected_share allows.
        """
        for item in rejected:
            self._ledger.setdefault((item.shard, item.key), item)
            if len(self._ledger) > self._limit:
                raise ValueError(
                    f"data.max_rejected_share: {len(self._ledger)} of {self._samples} samples of "
                    f"{self._option} are bad; the last is {item}"
                )

    def fresh(self) -> list[Rejected]:
        """Return the bad samples that this rank has found since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
