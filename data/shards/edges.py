"""Find samples that are split between two tars.

Programs that cut tars at a size may cut through a sample: some of its members end a tar, the others
begin the next one. Members are joined within a tar only, so both parts are rejected, or one of them
is packed without the members of the other.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from data.shards.account import MAX_EXAMPLES, Fate, LeftOut
from data.shards.manifest import Rejected

SPLIT = "samples that are split between two tars; join them: `tar --concatenate --file={} {}`"
"""Reason for the account, with the names of the first two tars."""

Edges = tuple[str, Sequence[str], Iterable[Rejected]]
"""Name of a tar, the keys of its first and last sample or none, and its rejected samples."""


def count_split(tars: Iterable[Edges]) -> LeftOut | None:
    """Count the samples that are split between one tar and the next; None if there are none.

    tars: in their order. A key that both have is a split sample only if one has too few members:
    whole samples may share a key.
    """
    found = list(_split(tars))
    if not found:
        return None
    before, after, _ = found[0]
    return LeftOut(
        fate=Fate.damaged.value,
        reason=SPLIT.format(before, after),
        count=len(found),
        examples=[key for _, _, key in found[:MAX_EXAMPLES]],
    )


def _split(tars: Iterable[Edges]) -> Iterator[tuple[str, str, str]]:
    for (before, edges, rejected), (after, next_edges, next_rejected) in pairwise(tars):
        if edges and next_edges and edges[-1] == next_edges[0]:
            key = edges[-1]
            if any(item.key == key for item in (*rejected, *next_rejected)):
                yield before, after, key
