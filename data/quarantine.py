"""The ledger of bad samples met while reading, each once however often it is met."""

from collections.abc import Iterable

from data.manifest import Rejected


class Quarantine:
    """Bad samples by shard and key, in the order in which they were met.

    Every rank meets its own; `fresh` hands over those that the others have not heard of, and `add`
    takes in theirs, so that all ranks end with the same ledger.

    Args:
        samples: Of the data set.
        max_share: Of them may be bad.
        option: The config path of the data set, for the error.
    """

    def __init__(self, samples: int, max_share: float, option: str) -> None:
        self._samples, self._limit, self._option = samples, max_share * samples, option
        self._ledger: dict[tuple[str, str], Rejected] = {}
        self._fresh: list[Rejected] = []

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def rejected(self) -> list[Rejected]:
        """All of them."""
        return list(self._ledger.values())

    def meet(self, rejected: Iterable[Rejected]) -> None:
        """Enter samples that this rank has found to be bad.

        Raises:
            ValueError: there are more than data.max_rejected_share allows.
        """
        for item in rejected:
            if (item.shard, item.key) not in self._ledger:
                self._fresh.append(item)
            self.add([item])

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Enter samples that are known to be bad.

        Raises:
            ValueError: there are more than data.max_rejected_share allows.
        """
        for item in rejected:
            self._ledger.setdefault((item.shard, item.key), item)
            if len(self._ledger) > self._limit:
                raise ValueError(
                    f"data.max_rejected_share: {len(self._ledger)} of {self._samples} samples of "
                    f"{self._option} are bad; the last is {item.key} in {item.shard}: {item.reason}"
                )

    def fresh(self) -> list[Rejected]:
        """Return what this rank has met since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
