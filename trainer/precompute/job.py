"""Encode image shards into latent shards: several tasks, which may be killed and run again.

One image shard gives one latent shard of the same name, byte-identical on every run with as many
threads. A task skips finished shards. The task that finds all shards finished writes the manifest.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from data.shards.account import Fate, Tally
from data.shards.manifest import (
    FILE_NAME,
    REJECTED_NAME,
    Kind,
    LatentInfo,
    Manifest,
    Rejected,
    Shard,
)
from trainer.config import Config
from trainer.precompute.decode import Decoder, Piece, decode
from trainer.precompute.encode import Encoder
from trainer.precompute.folder import LatentFolder, Receipt, shorten
from trainer.precompute.progress import EncodingProgress
from trainer.precompute.write import LatentWriter


def precompute(config: Config) -> None:
    """Encode this task's shards of data.train; write the manifest once all shards are finished.

    Raises: FileNotFoundError or ValueError that names the config path of missing or unusable data
    or weights; InUseError if another process runs this task.
    """
    command = f"python -m trainer.pack +experiment={config.run.experiment}"
    images = Manifest.load(config.data.train, option="data.train", command=command)
    encoder = Encoder(config)
    with closing(LatentFolder(config.data.latents, images, encoder.identity)) as folder:
        folder.join(config.precompute.task, config.precompute.num_tasks)
        encoded = _encode(config, images, encoder, folder)
        _merge(config, images, folder, encoded)


def _encode(config: Config, images: Manifest, encoder: Encoder, folder: LatentFolder) -> int:
    """Encode every num_tasks-th shard, if it is missing; return the number of encoded shards."""
    task = config.precompute
    own = images.shards[task.task :: task.num_tasks]
    folder.remove_leftovers(own)
    missing = folder.survey(own).missing
    if not missing:
        return 0
    todo = [shard for shard in own if shard.name in missing]
    with (
        EncodingProgress(sum(shard.samples for shard in todo)) as progress,
        LatentWriter(folder, progress) as writer,
        closing(
            decode(
                Decoder(config, images),
                cut(images, todo, task.batch_size, folder, progress),
                task.workers,
            )
        ) as batches,
    ):
        for samples, pixels in batches:
            encoded = encoder(pixels, samples.captions) if samples.keys else None
            writer.write(samples, encoded)
    return writer.finished


def cut(
    images: Manifest,
    todo: Sequence[Shard],
    batch_size: int,
    folder: LatentFolder,
    progress: EncodingProgress,
) -> Iterator[Piece]:
    """Claim the shards one by one, and cut them into batches; skip those of other tasks."""
    starts = np.cumsum([0, *(shard.samples for shard in images.shards)]).tolist()
    first = {shard.name: start for shard, start in zip(images.shards, starts, strict=False)}
    for shard in todo:
        if not folder.claim(shard):
            progress.skip(shard.samples)
            continue
        samples = first[shard.name] + np.arange(shard.samples)
        cuts = range(batch_size, shard.samples, batch_size)
        for number, part in enumerate(np.split(samples, cuts)):
            yield Piece(shard, part, last=number == len(cuts))


def _merge(config: Config, images: Manifest, folder: LatentFolder, encoded: int) -> None:
    """Write the manifest if every shard is finished; print the state of the folder."""
    receipts, missing = folder.survey(images.shards)
    if missing:
        shown = shorten([f"{name} ({reason})" for name, reason in missing.items()])
        print(f"{encoded} shards now; {len(missing)} are missing or other tasks': {shown}")
        return
    done = [receipts[shard.name] for shard in images.shards]
    rejected = [Rejected(**item) for receipt in done for item in receipt.rejected]
    _check_rejected(config, images, rejected)
    manifest = _manifest(config, images, folder, done, rejected)
    if not encoded and _holds(folder, manifest):
        print(f"nothing to do: all {len(done)} shards of {folder.path} are encoded")
        return
    folder.publish(manifest, rejected)
    print(
        f"data.latents: {manifest.samples} samples in {len(done)} shards, "
        f"{manifest.size_bytes / 2**20:.1f} MiB, at {folder.path} ({encoded} shards now)"
    )
    for reason, count in sorted(manifest.rejected.items()):
        print(f"  rejected {count}: {reason} (listed in {folder.path / REJECTED_NAME})")
    for remark, count in sorted(manifest.noted.items()):
        print(f"  noted {count}: {remark}")


def _manifest(
    config: Config,
    images: Manifest,
    folder: LatentFolder,
    receipts: Sequence[Receipt],
    rejected: Sequence[Rejected],
) -> Manifest:
    usable = [receipt for receipt in receipts if receipt.count]
    count = sum(receipt.count for receipt in usable)
    # fsum rounds exactly: the sums do not depend on the order of receipts
    mean = [math.fsum(sums) / count for sums in zip(*(r.sums for r in usable), strict=True)]
    noted: Counter[str] = Counter()
    for receipt in receipts:
        noted.update(receipt.noted)
    square = [math.fsum(s) / count for s in zip(*(r.square_sums for r in usable), strict=True)]
    tally = Tally()
    tally.merge(images.left_out)
    for item in rejected:
        tally.add(Fate.rejected, item.reason, item.key)
    return Manifest(
        kind=Kind.latents,
        shards=[Shard(**receipt.shard) for receipt in receipts],
        image_size=config.data.image_size,
        licence=images.licence,
        classes=images.classes,
        map_classes=images.map_classes if config.data.maps else [],
        box_classes=images.box_classes if config.data.boxes else [],
        rejected=dict(Counter(item.reason for item in rejected)),
        left_out=tally.entries(),
        noted=dict(noted),
        filters=images.filters,
        latents=LatentInfo(
            source_hash=images.hash,
            encoder=folder.identity["encoder"],
            transform=folder.identity["transform"],
            shape=usable[0].shape,
            mean=mean,
            std=[math.sqrt(max(s - m**2, 0.0)) for s, m in zip(square, mean, strict=True)],
            flip=folder.identity["flip"],
            text_encoder=folder.identity["text_encoder"],
            captions=folder.identity["captions"],
            images=bool(folder.identity["images"]),
        ),
    )


def _check_rejected(config: Config, images: Manifest, rejected: Sequence[Rejected]) -> None:
    bad, total = len(rejected), images.samples
    if bad == total or bad > config.data.max_rejected_share * total:
        last = f"; the last is {rejected[-1]}"
        raise ValueError(
            f"data.max_rejected_share: {bad} of {total} samples of data.train are bad"
            f"{last if rejected else ''}"
        )


def _holds(folder: LatentFolder, manifest: Manifest) -> bool:
    if not (folder.path / FILE_NAME).exists():
        return False
    try:
        return Manifest.load(str(folder.path), option="data.latents").hash == manifest.hash
    except ValueError:
        return False
