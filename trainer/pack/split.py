"""What packing has written of one data set, and what it has left out."""

from collections import Counter
from dataclasses import dataclass, field

from data.shards.account import Fate, Tally
from data.shards.annotations import Found
from data.shards.edges import Edges
from data.shards.manifest import Rejected, Shard
from data.shards.register import Registered
from data.sources.samples import NotChosen


@dataclass(slots=True, kw_only=True)
class Split:
    """The shards of one data set, and the samples that are left out of it."""

    tally: Tally = field(default_factory=Tally)
    shards: list[Shard] = field(default_factory=list[Shard])
    rejected: list[Rejected] = field(default_factory=list[Rejected])
    noted: Counter[str] = field(default_factory=Counter[str])
    edges: list[Edges] = field(default_factory=list[Edges])
    """First and last samples of tars."""
    empty_tars: list[str] = field(default_factory=list[str])
    """Damaged tars without a sample."""
    dropped: Counter[int] = field(default_factory=Counter[int])
    """Number of the rule in data.filters → samples that it dropped."""
    downloads: Counter[str] = field(default_factory=Counter[str])
    """Name of a count by img2dataset → its value, such as failed downloads."""
    found: Found = field(default_factory=Found)
    """Classes of maps and boxes."""

    def add(self, tar: Registered) -> None:
        """Add a tar."""
        self.shards.append(tar.shard)
        self.rejected += tar.rejected
        self.dropped.update(dict(enumerate(tar.dropped)))
        self.downloads.update(tar.downloads)
        self.found.add(tar.box_classes, tar.map_classes)
        self.tally.merge(tar.left_out)
        self.edges.append((tar.shard.name, tar.edges, tar.rejected))

    def leave_out(self, item: Rejected | NotChosen) -> None:
        """Count a sample that is in no shard."""
        if isinstance(item, NotChosen):
            self.tally.add(Fate.not_chosen, item.reason, item.key)
            return
        self.rejected.append(item)
        self.tally.add(Fate.rejected, item.reason, item.key)
