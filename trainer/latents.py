"""Image shards → latent shards: a job that may be split, killed and run again in any order.

One image shard gives one latent shard of the same name, byte-identical on every run. Beside it
lies a receipt: what it was made from, its sums, its rejected samples. A shard whose receipt fits is
skipped; whichever task finds all receipts writes the manifest.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import transforms
from data.codecs import CAPTION_EXTENSIONS, BadSampleError, decode_text, encode_npy
from data.manifest import FILE_NAME, Kind, LatentInfo, Manifest, Rejected, Shard
from data.reader import ShardReader, StoredSample, decode_square
from data.storage import write_atomic
from data.writer import ShardWriter
from models.autoencoder import AutoencoderKL, fingerprint, load_autoencoder
from models.conditioners import Conditioner, build_conditioner
from trainer.config import Config, Precision

COPIED_EXTENSIONS = (*CAPTION_EXTENSIONS, "json")


def precompute(config: Config) -> None:
    """Encode this task's shards of data.train into data.latents, and merge if all are done.

    Raises: FileNotFoundError or ValueError naming the config path of what is missing or unusable.
    """
    command = f"python -m trainer.pack +experiment={config.run.experiment}"
    images = Manifest.load(config.data.train, option="data.train", command=command)
    encoder = Encoder(config)
    job = Job(config, images, encoder.identity)
    todo = [shard for shard in job.own_shards() if job.receipt(shard) is None]
    total = sum(shard.samples for shard in todo)
    with tqdm(total=total, unit="image", disable=None, desc="precompute") as bar:
        for shard in todo:
            job.encode(shard, encoder, bar)
    job.merge(len(todo))


class Encoder:
    """The frozen networks: images to moments, captions to text tokens."""

    def __init__(self, config: Config) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        autoencoder: AutoencoderKL = load_autoencoder(config.autoencoder)
        text: Conditioner | None = None
        if config.data.store_text:
            text = build_conditioner(config.conditioner).to(self.device).eval()
        self.identity = {
            "encoder": fingerprint(autoencoder),
            "transform": transforms.describe(config.data.image_size),
            "precision": str(config.precompute.precision),
            "flip": config.data.flip,
            "text": f"{config.conditioner.model} {config.conditioner.pretrained}" if text else "",
        }
        self._dtype = (
            torch.bfloat16 if config.precompute.precision is Precision.bf16 else torch.float32
        )
        self._autoencoder = autoencoder.to(self.device, self._dtype).eval()
        self._text = text

    @torch.inference_mode()
    def moments(self, pixels: np.ndarray) -> Tensor:
        """pixels: [B, H, W, 3] uint8 → moments [B, 2, C, h, w] float16 on the CPU."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        images = images.to(self._dtype) / 127.5 - 1
        return self._autoencoder.encode(images).half().cpu()

    @torch.inference_mode()
    def text(self, captions: list[str]) -> Tensor | None:
        """Tokens [B, T, D] float16 on the CPU, if they are to be stored."""
        context = None if self._text is None else self._text(captions)
        return None if context is None else context.half().cpu()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a finished shard says of itself."""

    identity: dict[str, Any]
    """Of the encoder, the transform and the image shard."""
    shard: dict[str, Any]
    shape: list[int]
    """[C, h, w]."""
    count: int
    """Latent pixels a channel."""
    sums: list[float]
    """Of the posterior means, by channel."""
    square_sums: list[float]
    """Of mean² + variance, by channel."""
    rejected: list[dict[str, str]]


class Job:
    """The shards of one task, and the state of the whole."""

    def __init__(self, config: Config, images: Manifest, identity: dict[str, Any]) -> None:
        self._config = config
        self._images = images
        self._identity = identity
        self._folder = Path(config.data.latents)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._reader = ShardReader(config.data.train, images)
        self._starts = dict(
            zip(
                (shard.name for shard in images.shards),
                np.cumsum([0, *(shard.samples for shard in images.shards)]).tolist(),
                strict=False,
            )
        )

    def own_shards(self) -> list[Shard]:
        """Every num_tasks-th shard."""
        options = self._config.precompute
        return self._images.shards[options.task :: options.num_tasks]

    def receipt(self, source: Shard) -> Receipt | None:
        """The receipt of a finished shard; None if it is missing, cut off or of other origin."""
        try:
            receipt = Receipt(**json.loads(self._receipt_path(source).read_bytes()))
            shard = Shard(**receipt.shard)
            whole = (self._folder / shard.name).stat().st_size == shard.size_bytes
            whole = whole and (self._folder / shard.index_name).exists()
        except (OSError, ValueError, TypeError):
            return None
        return receipt if whole and receipt.identity == self._identity_of(source) else None

    def encode(self, source: Shard, encoder: Encoder, bar: tqdm) -> None:
        """Write one latent shard, then its receipt."""
        sums, count, shape = np.zeros((2, 0)), 0, [0, 0, 0]
        rejected: list[Rejected] = []
        with ShardWriter(self._folder, source.name, Kind.latents) as writer:
            for samples, pixels in self._batches(source, rejected):
                moments = encoder.moments(pixels)
                flipped = (
                    encoder.moments(pixels[:, :, ::-1].copy()) if self._config.data.flip else None
                )
                captions = [_caption(sample) for sample in samples]
                text = encoder.text(captions)
                for row, sample in enumerate(samples):
                    members = {"moments.npy": moments[row]}
                    if flipped is not None:
                        members["flip.moments.npy"] = flipped[row]
                    if text is not None:
                        members["text.npy"] = text[row]
                    if not all(member.isfinite().all() for member in members.values()):
                        rejected.append(_rejected(sample, "latents not finite"))
                        continue
                    copied = {
                        extension: bytes(sample.payload(extension))
                        for extension in COPIED_EXTENSIONS
                        if sample.has(extension)
                    }
                    arrays = {name: encode_npy(value.numpy()) for name, value in members.items()}
                    writer.write(sample.key, arrays | copied)
                    mean, log_variance = moments[row].double().flatten(2).numpy()
                    square = mean**2 + np.exp(log_variance)
                    added = np.stack([mean.sum(1), square.sum(1)])
                    sums = added if not count else sums + added
                    count += mean.shape[1]
                    shape = list(moments.shape[2:])
                bar.update(len(samples))
        receipt = Receipt(
            identity=self._identity_of(source),
            shard=dataclasses.asdict(writer.shard),
            shape=shape,
            count=count,
            sums=sums[0].tolist(),
            square_sums=sums[1].tolist(),
            rejected=[dataclasses.asdict(item) for item in rejected],
        )
        document = json.dumps(dataclasses.asdict(receipt), indent=1)
        write_atomic(self._receipt_path(source), document.encode())

    def merge(self, encoded: int) -> None:
        """Write the manifest once every shard has its receipt; say what is done and what is not."""
        receipts = {shard.name: self.receipt(shard) for shard in self._images.shards}
        missing = [name for name, receipt in receipts.items() if receipt is None]
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            print(f"{encoded} shards encoded; {len(missing)} are other tasks' or missing: {shown}")
            return
        done = [receipt for receipt in receipts.values() if receipt is not None]
        rejected = [Rejected(**item) for receipt in done for item in receipt.rejected]
        self._check_rejected(rejected)
        manifest = self._manifest(done, rejected)
        path = self._folder / FILE_NAME
        if not encoded and path.exists() and _same(self._folder, manifest):
            print(f"nothing to do: all {len(done)} shards of {self._folder} are encoded")
            return
        manifest.save(self._folder, rejected)
        print(
            f"data.latents: {manifest.samples} samples in {len(done)} shards, "
            f"{manifest.size_bytes / 2**20:.1f} MiB, at {self._folder} ({encoded} shards now)"
        )
        for reason, count in sorted(manifest.rejected.items()):
            print(f"  rejected {count}: {reason} (listed in {self._folder / 'rejected.jsonl'})")

    def _manifest(self, receipts: list[Receipt], rejected: list[Rejected]) -> Manifest:
        count = sum(receipt.count for receipt in receipts)
        means = np.sum([r.sums for r in receipts if r.count], axis=0) / count
        squares = np.sum([r.square_sums for r in receipts if r.count], axis=0) / count
        return Manifest(
            kind=Kind.latents,
            shards=[Shard(**receipt.shard) for receipt in receipts],
            image_size=self._config.data.image_size,
            licence=self._images.licence,
            rejected=dict(Counter(item.reason for item in rejected)),
            latents=LatentInfo(
                source_hash=self._images.hash,
                encoder=self._identity["encoder"],
                transform=self._identity["transform"],
                shape=next(receipt.shape for receipt in receipts if receipt.count),
                mean=means.tolist(),
                std=np.sqrt(squares - means**2).tolist(),
                flip=self._config.data.flip,
                text=self._config.data.store_text,
            ),
        )

    def _check_rejected(self, rejected: list[Rejected]) -> None:
        share = len(rejected) / max(1, self._images.samples)
        if share > self._config.data.max_rejected_share:
            last = rejected[-1]
            raise ValueError(
                f"data.max_rejected_share: {len(rejected)} of {self._images.samples} samples of "
                f"data.train are bad; the last is {last.key} in {last.shard}: {last.reason}"
            )

    def _batches(
        self, source: Shard, rejected: list[Rejected]
    ) -> Iterator[tuple[list[StoredSample], np.ndarray]]:
        """Decoded samples in batches, the next one being decoded while this one is encoded."""
        start, size = self._starts[source.name], self._config.precompute.batch_size
        samples = self._reader.find(np.arange(start, start + source.samples))
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        with ThreadPoolExecutor(2) as pool:
            coming = pool.submit(self._decode, parts[0]) if parts else None
            for number in range(len(parts)):
                assert coming is not None
                good, pixels, bad = coming.result()
                if number + 1 < len(parts):
                    coming = pool.submit(self._decode, parts[number + 1])
                rejected.extend(bad)
                if good:
                    yield good, np.stack(pixels)

    def _decode(
        self, samples: list[StoredSample]
    ) -> tuple[list[StoredSample], list[np.ndarray], list[Rejected]]:
        good, pixels, bad = [], [], []
        for sample in samples:
            try:
                _caption(sample)
                pixels.append(decode_square(sample, self._config.data.image_size))
                good.append(sample)
            except BadSampleError as error:
                bad.append(_rejected(sample, str(error)))
        return good, pixels, bad

    def _identity_of(self, source: Shard) -> dict[str, Any]:
        return {**self._identity, "source": source.sha256}

    def _receipt_path(self, source: Shard) -> Path:
        return self._folder / f"{source.name}.receipt.json"


def _caption(sample: StoredSample) -> str:
    extension = next(name for name in CAPTION_EXTENSIONS if sample.has(name))
    return decode_text(sample.payload(extension))


def _rejected(sample: StoredSample, reason: str) -> Rejected:
    return Rejected(key=sample.key, reason=reason, shard=sample.shard.name)


def _same(folder: Path, manifest: Manifest) -> bool:
    try:
        return Manifest.load(folder, option="data.latents").hash == manifest.hash
    except ValueError:
        return False
