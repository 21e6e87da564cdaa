"""The account of a source: what became of every sample, and what was left alone, with examples.

Samples that were found are packed, rejected, filtered or not chosen, and each is counted once.
Damage that belongs to no known sample, and files that are no samples, are counted beside them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from data.text import printable

MAX_EXAMPLES = 3
MAX_REASONS = 100
"""Most reasons of a data set; samples with further ones are counted together."""
OTHER = "other reasons"


class Fate(StrEnum):
    """What became of something that was found and is in no shard."""

    rejected = "rejected"
    """A sample that cannot be used."""
    filtered = "filtered"
    """A sample that a rule of data.filters dropped."""
    not_chosen = "not chosen"
    """A sample that the options leave out."""
    damaged = "damaged"
    """Bytes of a tar that belong to no known sample."""
    left_alone = "left alone"
    """A file, folder or member that is no sample."""


SAMPLES = (Fate.rejected, Fate.filtered, Fate.not_chosen)
"""Fates of samples; with those in shards they make up all that were found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was left out for one reason."""

    fate: str
    """One of Fate."""
    reason: str
    count: int
    examples: list[str]
    """Names of the first few."""

    def __str__(self) -> str:
        names = ", ".join(printable(name) for name in self.examples)
        more = ", …" if self.count > len(self.examples) else ""
        return f"{self.fate} {self.count}: {printable(self.reason)}" + (
            f" ({names}{more})" if any(self.examples) else ""
        )


@dataclass(slots=True)
class Tally:
    """Counts what is left out, by fate and reason."""

    _counts: dict[tuple[Fate, str], int] = field(default_factory=dict[tuple[Fate, str], int])
    _examples: dict[tuple[Fate, str], list[str]] = field(
        default_factory=dict[tuple[Fate, str], list[str]]
    )

    def add(self, fate: Fate, reason: str, example: str, count: int = 1) -> None:
        """Count something; example: its name."""
        self._add(fate, reason, [example], count)

    def merge(self, entries: Iterable[LeftOut]) -> None:
        """Add the counts of another tally."""
        for entry in entries:
            self._add(Fate(entry.fate), entry.reason, entry.examples, entry.count)

    def entries(self) -> list[LeftOut]:
        """Return the counts: by fate, the largest first."""
        fates = list(Fate)
        order = sorted(self._counts, key=lambda one: (fates.index(one[0]), -self._counts[one], one))
        return [
            LeftOut(
                fate=fate.value,
                reason=reason,
                count=self._counts[fate, reason],
                examples=self._examples[fate, reason],
            )
            for fate, reason in order
        ]

    def _add(self, fate: Fate, reason: str, examples: list[str], count: int) -> None:
        if (fate, reason) not in self._counts and len(self._counts) >= MAX_REASONS:
            reason = OTHER
        place = (fate, reason)
        self._counts[place] = self._counts.get(place, 0) + count
        shown = self._examples.setdefault(place, [])
        shown += [printable(one) for one in examples[: MAX_EXAMPLES - len(shown)]]


def total(entries: Iterable[LeftOut], *fates: Fate) -> int:
    """Return how many have one of these fates."""
    return sum(entry.count for entry in entries if entry.fate in fates)
