"""How many gradients DeepSpeed reduces at once: the buffer for them is there from the start."""

MAX_ELEMENTS = 500_000_000
"""DeepSpeed's own choice, which is for models that have more."""


def bucket_elements(parameters: int) -> int:
    """Of a model with so many trained parameters: never more than there are to reduce."""
    return max(1, min(MAX_ELEMENTS, parameters))
