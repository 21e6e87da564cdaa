"""Buckets in which DeepSpeed reduces gradients; it allocates them for every backward pass.

Where several ranks reduce, two small buckets take turns: one fills while the other is sent. So most
of the communication runs beside the backward pass. Elsewhere one bucket takes the whole model.
"""

from dataclasses import dataclass

MAX_ELEMENTS = 500_000_000
"""DeepSpeed's default; most models here have fewer parameters."""
OVERLAPPED_ELEMENTS = 50_000_000
"""100 MB in bf16: long enough for the full rate of a network, short beside a model."""
OVERLAPPED_RANKS = 2
"""Smallest number of ranks that have gradients to send."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Number and size of the buckets."""

    elements: int
    """Elements of each bucket."""
    overlaps: bool
    """Whether gradients are sent while the backward pass runs."""
    count: int = 1

    @property
    def total(self) -> int:
        """Elements of all buckets."""
        return self.count * self.elements


def gradient_buckets(parameters: int, *, stage: int, ranks: int, offload: bool) -> Buckets:
    """Choose the buckets for a number of trained parameters.

    stage: of ZeRO. Stage 0 sends after the backward pass. Stage 3 sends from one bucket. Offloaded
    optimizers take gradients after they are sent, one bucket after another.
    """
    overlaps = ranks >= OVERLAPPED_RANKS and (stage == 3 or (stage > 0 and not offload))
    largest = OVERLAPPED_ELEMENTS if overlaps else MAX_ELEMENTS
    elements = max(1, min(largest, parameters))
    return Buckets(elements, overlaps, count=2 if overlaps and stage < 3 else 1)
