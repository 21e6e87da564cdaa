"""Files that lie about their size, or try to run code when they are read."""

import pickle
from pathlib import Path
from typing import Any

from data.shards.tar import BLOCK_BYTES


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def write_bomb(path: Path, target: Path) -> None:
    """A pickle at `path` that creates `target` if it is ever loaded."""
    # The protocol of torch.save: torch warns of any other.
    path.write_bytes(pickle.dumps(Bomb(target), protocol=2))


def claim(shard: bytes, name: bytes, size: int) -> bytes:
    """Let a header claim another size."""
    start = shard.index(name)
    header = bytearray(shard[start : start + BLOCK_BYTES])
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    header[148:156] = b"%06o\0 " % total
    return shard[:start] + bytes(header) + shard[start + BLOCK_BYTES :]
