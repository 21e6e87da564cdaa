"""The position of a run in its data, saved in checkpoints."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The number of trained samples, and all values that decide the order of samples."""

    _OPTIONS: ClassVar = {
        "version": "version of the data plan",
        "manifest_hash": "data set",
        "seed": "run.seed",
        "lanes": "data.lanes",
        "block": "data.shuffle_block",
        "global_batch": "train.global_batch_size",
    }

    version: int
    """Version of the algorithm that computes the order from the values below."""
    manifest_hash: str
    """Identity of the data set."""
    seed: int
    lanes: int
    block: int
    """Samples of a lane that are shuffled together."""
    global_batch: int
    """Samples of an optimizer step, over all ranks."""
    samples: int
    """Samples trained so far, over all ranks."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Cursor":
        """Build a cursor from the output of `to_json`.

        Raises: ValueError where an entry is missing, unknown or of the wrong type.
        """
        kinds = {item.name: item.type for item in fields(cls)}
        if {name: type(value) for name, value in values.items()} != kinds:
            raise ValueError(f"not a data cursor: {values}")
        return cls(**values)

    def check(self, other: "Cursor") -> None:
        """Check that a run with the cursor `other` keeps this order of samples.

        Raises: ValueError that names each option with another value.
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
