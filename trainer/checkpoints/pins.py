"""Pins: a checkpoint that another process reads is kept, while the training writes newer ones.

A pin is a lease beside the checkpoints, `.pins/step_00001000.RANDOM.json`. Retention keeps the
checkpoint until the reader ends. The pin of a reader that was killed counts for as long as a lease.
"""

import secrets
from pathlib import Path

from data.storage.lease import Lease, is_held, take
from trainer.runs.paths import PINS


def pin(checkpoint: Path) -> Lease | None:
    """Pin a checkpoint until the lease is released; None if there is none, or it is read-only."""
    if not checkpoint.is_dir():
        return None
    path = checkpoint.parent / PINS / f"{checkpoint.name}.{secrets.token_hex(8)}.json"
    try:
        return take(path, "", lost=_ignore)
    except OSError:
        return None


def is_pinned(checkpoint: Path) -> bool:
    """Return whether a process that is alive reads a checkpoint; remove the pins of others."""
    pinned = False
    for path in (checkpoint.parent / PINS).glob(f"{checkpoint.name}.*.json"):
        if is_held(path):
            pinned = True
        else:
            path.unlink(missing_ok=True)
    return pinned


def _ignore(line: str) -> None:
    """Go on without the pin: its name is random, so no other process can own it."""
