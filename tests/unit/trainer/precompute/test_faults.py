"""Bad samples, dead workers, full disks and cut shards."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from data.shards.codecs import encode_npy, encode_png
from data.shards.manifest import Kind, Manifest, ManifestError
from data.shards.writer import ShardSetWriter
from tests.support.latent_jobs import (
    folder_hashes,
    job_config,
)
from tests.support.latent_sets import SAMPLES, moments, stored
from trainer.precompute import decode as decoder
from trainer.precompute import write as latent_writer
from trainer.precompute.job import precompute


def spoil(folder: Path) -> None:
    """Make samples 1, 2 and 9 of a job unusable, each in its way."""
    shutil.rmtree(folder / "train")
    with ShardSetWriter(folder / "train", Kind.images, 6) as writer:
        for number in range(SAMPLES):
            members = {"png": encode_png(Image.new("RGB", (16, 16), (9 * number, 99, 99)))}
            members |= {"txt": b"picture", "json": b'{"seed": %d}' % number}
            members |= {1: {"png": b"no picture"}, 2: {"txt": b"a" * 2**17}}.get(number, {})
            writer.write(members)
    Manifest(kind=Kind.images, shards=writer.shards).save(folder / "train")
    tar = folder / "train" / "000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"seed": 9}', b'{"seed": 8}'))


def test_bad_samples_are_left_out_and_listed(job: Path) -> None:
    spoil(job)
    config = job_config(job, "data.max_rejected_share=0.2")
    precompute(config)
    lines = (job / "latents" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": key, "reason": reason, "shard": shard}
        for key, reason, shard in [
            ("000000001", "image cannot be decoded (UnidentifiedImageError)", "000000.tar"),
            ("000000002", "text of 131072 bytes is over 65536", "000000.tar"),
            ("000000009", "the checksum of .json does not match", "000001.tar"),
        ]
    ]
    assert list(stored(job)) == [f"{n:09d}" for n in range(SAMPLES) if n not in (1, 2, 9)]
    manifest = Manifest.load(job / "latents", option="data.latents")
    assert manifest.rejected == dict.fromkeys((json.loads(line)["reason"] for line in lines), 1)


def test_too_many_bad_samples_stop_the_merge(job: Path) -> None:
    spoil(job)
    named = r"^data\.max_rejected_share: 3 of 26 .* 000000009 in 000001\.tar: the checksum"
    with pytest.raises(ValueError, match=named):
        precompute(job_config(job, "data.max_rejected_share=0.1"))
    assert not (job / "latents" / "manifest.json").exists()


def test_latents_that_overflow_are_left_out(job: Path, finished: Path) -> None:
    """The encoder's output is scaled until one sample, and no other, is beyond float16."""
    largest = np.abs(moments(finished).astype(np.float64)[:, 0]).max((1, 2, 3))
    (second, first) = np.sort(largest)[-2:]
    path = job / "first_stage.safetensors"
    weights = load_file(path)
    for name in ("quant_conv.weight", "quant_conv.bias"):
        weights[name] *= 65520 / np.sqrt(first * second)
    save_file(weights, path)
    precompute(job_config(job, "data.max_rejected_share=0.1"))
    (line,) = (job / "latents" / "rejected.jsonl").read_text().splitlines()
    bad = int(largest.argmax())
    assert json.loads(line) == {
        "key": f"{bad:09d}",
        "reason": "latents not finite",
        "shard": f"{bad // 6:06d}.tar",
    }
    assert len(stored(job)) == SAMPLES - 1


def test_a_set_without_a_good_sample_is_refused(job: Path) -> None:
    shutil.rmtree(job / "train")
    with ShardSetWriter(job / "train", Kind.images, 6) as writer:
        writer.write({"png": b"no picture", "txt": b""})
    Manifest(kind=Kind.images, shards=writer.shards).save(job / "train")
    with pytest.raises(ValueError, match=r"data\.max_rejected_share: 1 of 1 samples"):
        precompute(job_config(job, "data.max_rejected_share=1"))


def hold_claim(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """Another process at a shard, as the kernel sees it."""
    script = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script, str(folder / ".claims"), str(number)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def test_a_shard_that_another_task_is_at_is_left_to_it(
    job: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = job / "latents"
    latents.mkdir()
    for number in (1, 2):
        (latents / f".00000{number}.tar.x_1.part").write_bytes(b"half")
        (latents / f".00000{number}.tar.receipt.json.x_2.part").write_bytes(b"half")
    (latents / ".manifest.json.x_3.part").write_bytes(b"half")
    with hold_claim(latents, 2) as holder:
        precompute(job_config(job))
        assert "missing or other tasks': 000002.tar (not encoded)" in capsys.readouterr().out
        parts = sorted(path.name for path in latents.glob(".*.part"))
        assert parts == [
            ".000002.tar.receipt.json.x_2.part",
            ".000002.tar.x_1.part",
            ".manifest.json.x_3.part",
        ]
        holder.kill()
    precompute(job_config(job))
    assert folder_hashes(latents) == folder_hashes(finished / "latents")


def test_a_full_disk_ends_the_job_and_leaves_no_half_shard(job: Path, finished: Path) -> None:
    """The largest size of a file stands in for the disk's: the kernel refuses to write more."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, unlimited[1]))
    try:
        with (
            redirect_stdout(io.StringIO()),
            pytest.raises(OSError, match=r"^data\.latents: .* cannot be written: File too large"),
        ):
            precompute(job_config(job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in (job / "latents").iterdir()] == [".claims"]
    precompute(job_config(job))
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


def test_a_shard_that_lost_a_batch_is_never_finished(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write fails, and those after it could succeed."""
    failures = iter([OSError("gone for a moment")])

    def encode(array: np.ndarray) -> bytes:
        for failure in failures:
            raise failure
        return encode_npy(array)

    monkeypatch.setattr(latent_writer, "encode_npy", encode)
    with pytest.raises(OSError, match="gone for a moment"):
        precompute(job_config(job))
    assert [path.name for path in (job / "latents").iterdir()] == [".claims"]


def test_a_dead_worker_ends_the_job(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def die(*_: object, **__: object) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decoder, "decode_square", die)
    with pytest.raises(ChildProcessError, match=r"^precompute\.workers: one of 1 "):
        precompute(job_config(job, "precompute.workers=1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_image_shard_is_named(job: Path, workers: int) -> None:
    shard = job / "train" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ManifestError, match=r"000002\.tar"):
        precompute(job_config(job, f"precompute.workers={workers}"))
