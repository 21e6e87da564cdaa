"""Ownership of an output folder by all ranks of a job."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from data.storage.lease import NAME, InUseError, Lease, take
from trainer.runtime.ranks import ALONE, Ranks, end_together


@contextmanager
def owned(folder: Path, remedy: str, ranks: Ranks = ALONE, name: str = NAME) -> Generator[None]:
    """Own a folder of a run, or one name in it, while the block runs; collective.

    Rank 0 holds the lease. remedy: what a user does about a refusal, in words. name: name of the
    lease; two leases of other names do not exclude each other.
    Raises: SystemExit on every rank after a line that names the owner, if another process owns it;
    OSError that names run.dir if rank 0 cannot write to the folder.
    """
    lease: Lease | None = None
    own_refusal = ""
    if ranks.is_main:
        try:
            lease = take(folder / name, remedy)
        except InUseError as error:
            own_refusal = str(error)
        except OSError as error:
            reason = f"cannot write to {folder}: {error.strerror}"
            raise OSError(f"run.dir: {reason}; choose another folder") from error
    refusal = ranks.from_main(lambda: own_refusal)
    if refusal:
        end_together(ranks, refusal)
    try:
        yield
    finally:
        if lease is not None:
            lease.release()
