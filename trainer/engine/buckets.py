"""Size of the bucket in which DeepSpeed reduces gradients; DeepSpeed allocates it at the start."""

MAX_ELEMENTS = 500_000_000
"""DeepSpeed's default; most models here have fewer parameters."""


def bucket_elements(parameters: int) -> int:
    """Return the number of elements of the bucket: the trained parameters, up to MAX_ELEMENTS."""
    return max(1, min(MAX_ELEMENTS, parameters))
