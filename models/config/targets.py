"""Import of functions and classes by their names in the tables, which do not import torch."""

import importlib
from typing import Any


def resolve(target: str) -> Any:
    """Import the function or class `module:name`.

    Raises: ModuleNotFoundError or AttributeError if there is no such module or name.
    """
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
