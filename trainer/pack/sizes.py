"""What the crop to a square takes from pictures, and how far small ones are enlarged."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

LOST = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper ends of the bins of the share that is cropped away."""
ENLARGED = (1.0, 1.25, 1.5, 2.0, 4.0, float("inf"))
"""Upper ends of the bins of the factor by which the short side grows."""
BAR = 30
"""[characters] Longest bar of a histogram."""

Side = tuple[int, int]
"""(width, height) of an upright picture, in pixels."""


def lost_shares(sides: Sequence[Side]) -> np.ndarray:
    """Return the share of each picture that the centre crop to a square takes away: [N]."""
    both = np.array(sides, float).reshape(-1, 2)
    return 1 - both.min(1) / both.max(1)


def enlargements(sides: Sequence[Side], image_size: int) -> np.ndarray:
    """Return the factor by which the short side of each picture is scaled: [N]; 1 or less: none."""
    return image_size / np.array(sides, float).reshape(-1, 2).min(1)


def size_lines(sides: Sequence[Side], image_size: int) -> Iterator[str]:
    """Yield a table and histograms of what pictures lose by the crop and gain by enlarging."""
    if not sides:
        return
    lost, factors = lost_shares(sides), enlargements(sides, image_size)
    yield f"cropped to {image_size} px, {len(sides):,} pictures:"
    yield f"  cropped away: {lost.mean():.1%} of their pixels on average, up to {lost.max():.1%}"
    yield from _histogram(lost, LOST, lambda end: f"up to {end:.0%}" if end else "nothing")
    grown = factors > 1
    most = f", up to {factors.max():.2f}x; pack.max_enlarge leaves them out"
    yield f"  enlarged beyond 1.0x: {grown.mean():.1%} of them{most if grown.any() else ''}"
    if grown.any():
        yield from _histogram(
            factors,
            ENLARGED,
            lambda end: "not" if end == 1 else f"up to {end:g}x" if end < float("inf") else "more",
        )


def _histogram(
    values: np.ndarray, ends: Sequence[float], label: Callable[[float], str]
) -> Iterator[str]:
    places = np.searchsorted(np.array(ends), values - 1e-9)
    counts = np.bincount(np.minimum(places, len(ends) - 1), minlength=len(ends))
    for end, count in zip(ends, counts.tolist(), strict=True):
        if count:
            share = count / len(values)
            yield f"    {label(end):>10} {share:>6.1%} {'█' * max(1, round(share * BAR))}"
