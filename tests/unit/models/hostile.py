"""Files that try to run code when they are read."""

import pickle
from pathlib import Path


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def write_bomb(path: Path, target: Path) -> None:
    """A pickle at `path` that creates `target` if it is ever loaded."""
    path.write_bytes(pickle.dumps(Bomb(target)))
