"""What packing found and what became of it, on the screen; a set that lost too much is refused."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data.shards.account import SAMPLES, Fate, Tally, total
from data.shards.manifest import REJECTED_NAME, Manifest

SHOWN = 5
"""Most reasons in one line."""
TOLERATED = 2
"""Lost samples that a set may have if it is too small for a share: they are named."""


def account_lines(manifest: Manifest) -> Iterator[str]:
    """Yield how many samples were found, and a line for each reason why one is in no shard."""
    parts = [f"{total(manifest.left_out, fate)} {fate}" for fate in SAMPLES]
    yield f"of {manifest.found} found: {manifest.samples} packed, {', '.join(parts)}"
    yield from (str(entry) for entry in manifest.left_out if entry.fate != Fate.filtered)


def print_summary(option: str, folder: Path, manifest: Manifest) -> None:
    """Print the counts of a data set."""
    print(
        f"{option}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{manifest.size_bytes / 2**20:.1f} MiB, at {folder}"
    )
    if manifest.downloads:
        counts = ", ".join(f"{name} {count}" for name, count in manifest.downloads.items())
        print(f"  img2dataset: {counts}")
    for line in account_lines(manifest):
        print(f"  {line}")
    for remark, count in sorted(manifest.noted.items()):
        print(f"  noted {count}: {remark}")
    examples = {one.reason: one.examples for one in manifest.left_out if one.fate == Fate.filtered}
    for rule in manifest.filters:
        names = f" ({', '.join(examples[rule.rule])})" if rule.rule in examples else ""
        print(f"  filter {rule.rule}: {rule.kept} kept, {rule.dropped} dropped{names}")
        if not (rule.kept and rule.dropped):
            effect = "everything" if rule.dropped else "nothing"
            print(f"  warning: filter {rule.rule} drops {effect}: are its name and bounds right?")
    if manifest.licence:
        print(f"  licence: {manifest.licence}")


def allows(lost: int, found: int, allowed: float) -> bool:
    """Say whether a set may lose so many of the samples that were found.

    allowed: pack.max_rejected.
    """
    too_few = 0 < found * allowed < 1  # one sample is already more than the share
    return lost / max(found, 1) <= allowed or (too_few and lost <= TOLERATED)


def refuse_losses(
    manifests: Mapping[Path, Manifest], empty_tars: Iterable[str], allowed: float
) -> None:
    """Raise ValueError if more than a share of what was found cannot be used.

    manifests: folder → the data set that is about to be published. empty_tars: damaged tars without
    a sample, whose samples cannot be counted. allowed: pack.max_rejected.
    """
    found = sum(manifest.found for manifest in manifests.values())
    tally = Tally()
    for manifest in manifests.values():
        tally.merge(manifest.left_out)
    lost, empty = total(tally.entries(), Fate.rejected), list(empty_tars)
    tars = sum(len(manifest.shards) for manifest in manifests.values())
    share = max(lost / max(found, 1), len(empty) / max(tars, 1))
    if share <= allowed or (allows(lost, found, allowed) and not empty):
        return
    more = (
        f"{len(empty)} of {tars} tars damaged without a sample, {empty[0]} first" if empty else ""
    )
    raise losses(tally, f"{lost} of {found} samples", allowed, share, manifests, more)


def losses(
    tally: Tally,
    lost: str,
    allowed: float,
    share: float,
    folders: Iterable[Path],
    more: str = "",
) -> ValueError:
    """Return the error of a set that loses too much.

    lost: how many samples. share: a part that would have to be allowed. folders: of the ledgers.
    more: another reason.
    """
    # among the files left alone may be a table of captions under another name
    shown = {
        fate: [str(entry) for entry in tally.entries() if entry.fate == fate][:SHOWN]
        for fate in (Fate.rejected, Fate.left_alone)
    }
    reasons = [*shown[Fate.rejected], *shown[Fate.left_alone], *([more] if more else [])]
    ledgers = " and ".join(str(folder / REJECTED_NAME) for folder in folders)
    return ValueError(
        f"pack.max_rejected: {lost} cannot be used, which is more than {allowed:.2%}; "
        f"{'; '.join(reasons)}. The list is in {ledgers}. Mend the source, or allow it by "
        f"pack.max_rejected={math.ceil(share * 100) / 100}"
    )
