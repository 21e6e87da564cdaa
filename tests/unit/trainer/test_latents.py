"""Latent jobs: what they write, what they refuse, and what they leave behind when they fail."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import closing, redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from data.codecs import encode_npy, encode_png
from data.manifest import Kind, Manifest, ManifestError, Shard
from data.transforms import square
from data.writer import ShardSetWriter
from models.autoencoder import load_autoencoder
from models.conditioners import Text, build_conditioner, fingerprint
from tests.latent_jobs import folder_hashes, job_config, make_job, write_first_stage, write_pictures
from trainer import decoder, latent_writer, progress
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.latents import cut, precompute
from trainer.progress import Progress
from trainer.receipts import LatentFolder
from trainer.tasks.diffusion import DiffusionTask

SAMPLES = 26


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that one task has done in one go."""
    folder = tmp_path_factory.mktemp("job")
    precompute(make_job(folder))
    return folder


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """The folder of the same job, with nothing done."""
    shutil.copytree(finished, tmp_path / "job", ignore=shutil.ignore_patterns("latents"))
    return tmp_path / "job"


def stored(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every member of every latent shard, by key and extension, as tarfile reads them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("latents/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in samples.setdefault(key, {})
                samples[key][extension] = file.read()
    return samples


def moments(folder: Path, extension: str = "moments.npy") -> np.ndarray:
    arrays = [np.load(io.BytesIO(sample[extension])) for sample in stored(folder).values()]
    return np.stack(arrays)


def inputs(folder: Path) -> torch.Tensor:
    """The pictures as the first stage sees them: [B, 3, 16, 16] in [-1, 1]."""
    pixels = []
    for path in sorted(folder.glob("train/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".png") and file is not None:
                    pixels.append(square(Image.open(file), 16))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double().div(127.5).sub(1)


def direct(config: Config, images: torch.Tensor) -> np.ndarray:
    """Moments in double precision, one image at a time."""
    network = load_autoencoder(config.autoencoder).double()
    with torch.inference_mode():
        return torch.cat([network.encode(image[None]) for image in images]).numpy()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 1e-5, 1e-3), ("bf16", 2e-3, 5e-2)]
)
def test_every_sample_has_its_moments_and_keeps_its_caption(job, precision, least, most):
    config = job_config(job, f"precompute.precision={precision}", "data.flip=true")
    precompute(config)
    samples, images = stored(job), inputs(job)
    assert list(samples) == [f"{number:09d}" for number in range(SAMPLES)]
    for number, sample in enumerate(samples.values()):
        assert sample.keys() == {"moments.npy", "flip.moments.npy", "txt", "json"}
        assert sample["txt"] == f"picture {number}".encode()
        assert json.loads(sample["json"]) == {"seed": number}
    assert moments(job).dtype == np.float16
    assert least < np.abs(moments(job) - direct(config, images)).max() < most
    flipped = moments(job, "flip.moments.npy")
    assert least < np.abs(flipped - direct(config, images.flip(3))).max() < most
    assert np.abs(moments(job) - flipped).max() > 10 * most


def test_the_manifest_says_where_the_latents_come_from(finished):
    images = Manifest.load(finished / "train", option="data.train")
    manifest = Manifest.load(finished / "latents", option="data.latents")
    info = manifest.latents
    assert info is not None
    assert [shard.samples for shard in manifest.shards] == [6, 6, 6, 6, 2]
    assert manifest.licence == "CC0"
    assert info.source_hash == images.hash
    assert info.shape == [4, 4, 4]
    assert not info.flip
    assert not info.text


def test_statistics_are_those_of_all_latents(finished):
    info = Manifest.load(finished / "latents", option="data.latents").latents
    assert info is not None
    mean, log_variance = moments(finished).astype(np.float64).swapaxes(0, 1)
    axes = (0, 2, 3)
    np.testing.assert_allclose(info.mean, mean.mean(axes), rtol=1e-13)
    total = mean.var(axes) + np.exp(log_variance).mean(axes)
    np.testing.assert_allclose(info.std, np.sqrt(total), rtol=1e-13)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_tasks_in_any_order_give_the_same_folder(job, finished, workers, capsys):
    for task, num_tasks in [(2, 3), (0, 2), (1, 2)]:
        split = [f"precompute.task={task}", f"precompute.num_tasks={num_tasks}"]
        precompute(job_config(job, f"precompute.workers={workers}", *split))
        said = capsys.readouterr().out
    assert "(2 shards now)" in said
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


def test_an_unfinished_set_has_no_manifest_and_names_what_is_missing(job, capsys):
    precompute(job_config(job, "precompute.num_tasks=3"))
    assert "2 shards now; 3 are missing or other tasks': 000001.tar (not encoded), 00000" in (
        capsys.readouterr().out
    )
    with pytest.raises(ManifestError, match="no manifest"):
        Manifest.load(job / "latents", option="data.latents")


def test_finished_shards_are_left_alone(job, capsys):
    config = job_config(job)
    precompute(config)
    before = {path: path.stat().st_mtime_ns for path in (job / "latents").iterdir()}
    capsys.readouterr()
    precompute(config)
    assert "nothing to do: all 5 shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (job / "latents").iterdir()} == before


@pytest.mark.parametrize("suffix", [".tar", ".tar.index.npy", ".tar.receipt.json"])
@pytest.mark.parametrize("left_bytes", [None, 10])
def test_what_is_lost_is_encoded_again(job, finished, suffix, left_bytes, capsys):
    shutil.copytree(finished / "latents", job / "latents")
    file = job / "latents" / f"000003{suffix}"
    cut = file.read_bytes()[:left_bytes]
    file.unlink()
    if left_bytes and suffix != ".tar.index.npy":
        file.write_bytes(cut)
    precompute(job_config(job))
    assert "(1 shards now)" in capsys.readouterr().out
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("precompute.precision=bf16", "precompute.precision"),
        ("data.flip=true", "data.flip"),
        ("data.image_size=32", "data.image_size"),
        ("data.store_text=true", "data.store_text or conditioner.pretrained"),
        ("", "autoencoder.weights"),
    ],
)
def test_shards_of_another_encoder_are_refused_by_name(job, finished, override, option):
    shutil.copytree(finished / "latents", job / "latents")
    config = job_config(job, *filter(None, [override]))
    if not override:
        write_first_stage(Path(config.autoencoder.weights), config, seed=1)
    named = rf"^data\.latents: .*: 000000\.tar \({re.escape(option)}\), .* and 2 more; delete"
    with pytest.raises(ValueError, match=named):
        precompute(config)
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


def test_a_mixed_folder_is_refused_when_merged(job):
    precompute(job_config(job, "precompute.num_tasks=2"))
    second = ["precompute.task=1", "precompute.num_tasks=2", "precompute.precision=bf16"]
    with pytest.raises(ValueError, match=r"000000\.tar \(precompute\.precision\)"):
        precompute(job_config(job, *second))
    assert not (job / "latents" / "manifest.json").exists()


def test_a_replaced_image_shard_is_encoded_again(job, finished, capsys):
    shutil.copytree(finished / "latents", job / "latents")
    shutil.rmtree(job / "train")
    write_pictures(job / "train", SAMPLES - 1, 6, 16)
    precompute(job_config(job, "precompute.num_tasks=2", "precompute.task=1"))
    assert "missing or other tasks': 000004.tar (its image shard was replaced)" in (
        capsys.readouterr().out
    )
    precompute(job_config(job))
    assert "(1 shards now)" in capsys.readouterr().out
    assert len(stored(job)) == SAMPLES - 1


def spoil(folder: Path) -> None:
    """Make samples 1, 2 and 9 of a job unusable, each in its way."""
    shutil.rmtree(folder / "train")
    with ShardSetWriter(folder / "train", Kind.images, 6) as writer:
        for number in range(SAMPLES):
            members = {"png": encode_png(Image.new("RGB", (16, 16), (9 * number, 99, 99)))}
            members |= {"txt": b"picture", "json": b'{"seed": %d}' % number}
            members |= {1: {"png": b"no picture"}, 2: {"txt": b"\xff\xfe"}}.get(number, {})
            writer.write(members)
    Manifest(kind=Kind.images, shards=writer.shards).save(folder / "train")
    tar = folder / "train" / "000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"seed": 9}', b'{"seed": 8}'))


def test_bad_samples_are_left_out_and_listed(job):
    spoil(job)
    config = job_config(job, "data.max_rejected_share=0.2")
    precompute(config)
    lines = (job / "latents" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": key, "reason": reason, "shard": shard}
        for key, reason, shard in [
            ("000000001", "image cannot be decoded (UnidentifiedImageError)", "000000.tar"),
            ("000000002", "text is not UTF-8", "000000.tar"),
            ("000000009", "the checksum of .json does not match", "000001.tar"),
        ]
    ]
    assert list(stored(job)) == [f"{n:09d}" for n in range(SAMPLES) if n not in (1, 2, 9)]
    manifest = Manifest.load(job / "latents", option="data.latents")
    assert manifest.rejected == dict.fromkeys((json.loads(line)["reason"] for line in lines), 1)


def test_too_many_bad_samples_stop_the_merge(job):
    spoil(job)
    named = r"^data\.max_rejected_share: 3 of 26 .* 000000009 in 000001\.tar: the checksum"
    with pytest.raises(ValueError, match=named):
        precompute(job_config(job, "data.max_rejected_share=0.1"))
    assert not (job / "latents" / "manifest.json").exists()


def test_latents_that_overflow_are_left_out(job, finished):
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


def test_a_set_without_a_good_sample_is_refused(job):
    shutil.rmtree(job / "train")
    with ShardSetWriter(job / "train", Kind.images, 6) as writer:
        writer.write({"png": b"no picture", "txt": b""})
    Manifest(kind=Kind.images, shards=writer.shards).save(job / "train")
    with pytest.raises(ValueError, match=r"data\.max_rejected_share: 1 of 1 samples"):
        precompute(job_config(job, "data.max_rejected_share=1"))


def test_text_tokens_are_stored_with_the_name_of_their_encoder(job):
    config = job_config(job, "data.store_text=true")
    precompute(config)
    text = build_conditioner(config.conditioner)
    assert isinstance(text, Text)
    tokens = [np.load(io.BytesIO(sample["text.npy"])) for sample in stored(job).values()]
    captions = [sample["txt"].decode() for sample in stored(job).values()]
    expected = text(captions).tokens.numpy()
    np.testing.assert_allclose(np.stack(tokens), expected, rtol=1e-3, atol=1e-3)
    info = Manifest.load(job / "latents", option="data.latents").latents
    assert info is not None
    assert info.text
    assert info.text_encoder == fingerprint(text)


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("conditioner.features=penultimate", "conditioner.pretrained"),
        ("autoencoder.weights={other}", "autoencoder.weights"),
    ],
)
def test_training_refuses_what_other_networks_made(job, override, option):
    precompute(job_config(job, "data.store_text=true"))
    write_first_stage(job / "other.safetensors", job_config(job), seed=1)
    config = job_config(
        job, "data.store_text=true", override.format(other=job / "other.safetensors")
    )
    with pytest.raises(ValueError, match=rf"^data\.latents: .* than {re.escape(option)}; choose"):
        DiffusionTask(config, Ranks(0, 1, torch.device("cpu")))


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


def test_a_shard_that_another_task_is_at_is_left_to_it(job, finished, capsys):
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


def test_a_full_disk_ends_the_job_and_leaves_no_half_shard(job, finished):
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


def test_a_shard_that_lost_a_batch_is_never_finished(job, monkeypatch):
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


def test_a_dead_worker_ends_the_job(job, monkeypatch):
    parent = os.getpid()

    def die(sample: object, size: int) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decoder, "decode_square", die)
    with pytest.raises(ChildProcessError, match=r"^precompute\.workers: one of 1 "):
        precompute(job_config(job, "precompute.workers=1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_image_shard_is_named(job, workers):
    shard = job / "train" / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ManifestError, match=r"000002\.tar"):
        precompute(job_config(job, f"precompute.workers={workers}"))


def test_latents_go_to_a_local_folder(job):
    with pytest.raises(ValueError, match=r"^data\.latents: s3://bucket is no local folder"):
        precompute(job_config(job, "data.latents=s3://bucket"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 9))
def test_shards_are_cut_into_batches_of_their_own(tmp_path_factory, sizes, batch_size):
    shards = [
        Shard(name=f"{n}.tar", samples=size, size_bytes=0, sha256="", index_sha256="")
        for n, size in enumerate(sizes)
    ]
    images = Manifest(kind=Kind.images, shards=shards)
    place = str(tmp_path_factory.mktemp("latents"))
    with closing(LatentFolder(place, images, {})) as folder:
        pieces = list(cut(images, shards, batch_size, folder, Progress(sum(sizes))))
    assert np.concatenate([piece.samples for piece in pieces]).tolist() == list(range(sum(sizes)))
    assert [piece.source for piece in pieces if piece.last] == shards
    for piece, following in pairwise(pieces):
        assert piece.last == (piece.source != following.source)
        assert len(piece.samples) == batch_size or piece.last


def test_a_log_file_gets_lines_with_rate_share_and_time_left(job, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    precompute(job_config(job))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    form = r"precompute +(\d+)/26 images  [\d.]+ images/s  encoder +(\d+)%  \d\d:\d\d left"
    matches = [re.fullmatch(form, line) for line in lines[:9]]
    assert [match and int(match[1]) for match in matches] == [4, 6, 10, 12, 16, 18, 22, 24, 26]
    assert all(match and 0 < int(match[2]) < 100 for match in matches)
    summary = r"26 images in 00:\d\d: [\d.]+ images/s, encoder [\d.]+% of the time"
    assert re.fullmatch(summary, lines[9])
    assert captured.err == ""


def test_a_terminal_gets_a_bar(job, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    precompute(job_config(job))
    last = terminal.getvalue().split("\r")[-1]
    assert "26/26" in last
    assert re.search(r"image/s, encoder \d+%", last)
