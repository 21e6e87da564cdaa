"""How far a run has come in its data, and everything that decides the order of the rest."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Everything that decides the order of samples, and how many have been trained."""

    version: int
    manifest_hash: str
    seed: int
    lanes: int
    block: int
    global_batch: int
    samples: int

    _OPTIONS: ClassVar = {
        "version": "version of the data plan",
        "manifest_hash": "data set",
        "seed": "run.seed",
        "lanes": "data.lanes",
        "block": "data.shuffle_block",
        "global_batch": "train.global_batch_size",
    }

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Cursor":
        """Build a cursor from what `to_json` gave.

        Raises:
            ValueError: an entry is missing, unknown or of the wrong type.
        """
        kinds = {item.name: item.type for item in fields(cls)}
        if {name: type(value) for name, value in values.items()} != kinds:
            raise ValueError(f"not a data cursor: {values}")
        return cls(**values)

    def check(self, other: "Cursor") -> None:
        """Compare with the cursor of the run that is to go on from here.

        Raises:
            ValueError: the order of samples would change; names what differs.
        """
        differences = [
            f"{option} was {getattr(self, name)}, is {getattr(other, name)}"
            for name, option in self._OPTIONS.items()
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint's order of samples is another one: {'; '.join(differences)}"
            )
