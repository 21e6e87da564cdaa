"""What packing found and what became of it, on the screen; a set that lost too much is refused."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data.shards.account import SAMPLES, Fate, LeftOut, Tally, total
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
    rejected = [entry for entry in tally.entries() if entry.fate == Fate.rejected]
    lost, empty = total(rejected, Fate.rejected), list(empty_tars)
    tars = sum(len(manifest.shards) for manifest in manifests.values())
    share = max(lost / max(found, 1), len(empty) / max(tars, 1))
    too_few = 0 < found * allowed < 1  # one sample is already more than the share
    if share <= allowed or (too_few and lost <= TOLERATED and not empty):
        return
    reasons: list[LeftOut | str] = [*rejected[:SHOWN]]
    if empty:
        reasons.append(f"{len(empty)} of {tars} tars damaged without a sample, {empty[0]} first")
    ledgers = " and ".join(str(folder / REJECTED_NAME) for folder in manifests)
    raise ValueError(
        f"pack.max_rejected: {lost} of {found} samples cannot be used, which is more than "
        f"{allowed:.2%}; {'; '.join(map(str, reasons))}. {ledgers} has the list. Mend the source, "
        f"or allow it by pack.max_rejected={math.ceil(share * 100) / 100}"
    )
