"""Latent jobs: what they write, what they refuse, and what they leave behind when they fail."""

import io
import json
import re
import shutil
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.order.batches import Share
from data.shards.annotations import Box, encode_boxes, encode_map
from data.shards.codecs import BOXES, MAP, encode_png
from data.shards.manifest import Kind, Manifest, ManifestError, Shard
from data.shards.writer import ShardSetWriter
from data.streams.latents import LatentStream
from models.conditioning.conditioners import build_conditioner
from models.conditioning.text import Text, text_fingerprint
from tests.support.latent_jobs import (
    folder_hashes,
    job_config,
    write_first_stage,
    write_pictures,
)
from tests.support.latent_sets import SAMPLES, direct, inputs, moments, stored
from trainer.precompute import progress
from trainer.precompute.folder import LatentFolder
from trainer.precompute.job import cut, precompute
from trainer.precompute.progress import EncodingProgress
from trainer.runtime.ranks import ALONE
from trainer.train.denoiser import build_denoising


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 1e-5, 1e-3), ("bf16", 2e-3, 5e-2)]
)
def test_every_sample_has_its_moments_and_keeps_its_caption(
    job: Path, precision: str, least: float, most: float
) -> None:
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


def test_the_manifest_says_where_the_latents_come_from(finished: Path) -> None:
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


def test_statistics_are_those_of_all_latents(finished: Path) -> None:
    info = Manifest.load(finished / "latents", option="data.latents").latents
    assert info is not None
    mean, log_variance = moments(finished).astype(np.float64).swapaxes(0, 1)
    axes = (0, 2, 3)
    np.testing.assert_allclose(info.mean, mean.mean(axes), rtol=1e-13)
    total = mean.var(axes) + np.exp(log_variance).mean(axes)
    np.testing.assert_allclose(info.std, np.sqrt(total), rtol=1e-13)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_tasks_in_any_order_give_the_same_folder(
    job: Path, finished: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, num_tasks in [(2, 3), (0, 2), (1, 2)]:
        split = [f"precompute.task={task}", f"precompute.num_tasks={num_tasks}"]
        precompute(job_config(job, f"precompute.workers={workers}", *split))
        said = capsys.readouterr().out
    assert "(2 shards now)" in said
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


def test_an_unfinished_set_has_no_manifest_and_names_what_is_missing(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(job_config(job, "precompute.num_tasks=3"))
    assert "2 shards now; 3 are missing or other tasks': 000001.tar (not encoded), 00000" in (
        capsys.readouterr().out
    )
    with pytest.raises(ManifestError, match="no manifest"):
        Manifest.load(job / "latents", option="data.latents")


def test_finished_shards_are_left_alone(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job_config(job)
    precompute(config)
    before = {path: path.stat().st_mtime_ns for path in (job / "latents").iterdir()}
    capsys.readouterr()
    precompute(config)
    assert "nothing to do: all 5 shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (job / "latents").iterdir()} == before


@pytest.mark.parametrize("suffix", [".tar", ".tar.index.npy", ".tar.receipt.json"])
@pytest.mark.parametrize("left_bytes", [None, 10])
def test_what_is_lost_is_encoded_again(
    job: Path,
    finished: Path,
    suffix: str,
    left_bytes: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
        ("data.image_size=32", "data.image_size or data.pixels"),
        ("data.store_text=true", "data.store_text or conditioner.pretrained"),
        ("", "autoencoder.weights"),
    ],
)
def test_shards_of_another_encoder_are_refused_by_name(
    job: Path, finished: Path, override: str, option: str
) -> None:
    shutil.copytree(finished / "latents", job / "latents")
    config = job_config(job, *filter(None, [override]))
    if not override:
        write_first_stage(Path(config.autoencoder.weights), config, seed=1)
    named = rf"^data\.latents: .*: 000000\.tar \({re.escape(option)}\), .* and 2 more; delete"
    with pytest.raises(ValueError, match=named):
        precompute(config)
    assert folder_hashes(job / "latents") == folder_hashes(finished / "latents")


def test_a_mixed_folder_is_refused_when_merged(job: Path) -> None:
    precompute(job_config(job, "precompute.num_tasks=2"))
    second = ["precompute.task=1", "precompute.num_tasks=2", "precompute.precision=bf16"]
    with pytest.raises(ValueError, match=r"000000\.tar \(precompute\.precision\)"):
        precompute(job_config(job, *second))
    assert not (job / "latents" / "manifest.json").exists()


def test_a_replaced_image_shard_is_encoded_again(
    job: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_text_tokens_are_stored_with_the_name_of_their_encoder(job: Path) -> None:
    config = job_config(job, "data.store_text=true")
    precompute(config)
    text = build_conditioner(config.conditioner)
    assert isinstance(text, Text)
    tokens = [np.load(io.BytesIO(sample["text.npy"])) for sample in stored(job).values()]
    captions = [sample["txt"].decode() for sample in stored(job).values()]
    expected = text.encode(captions)
    np.testing.assert_allclose(np.stack(tokens), expected.numpy(), rtol=1e-3, atol=1e-3)
    info = Manifest.load(job / "latents", option="data.latents").latents
    assert info is not None
    assert info.text
    assert info.text_encoder == text_fingerprint(text)


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("conditioner.features=penultimate", "conditioner.pretrained"),
        ("autoencoder.weights={other}", "autoencoder.weights"),
    ],
)
def test_training_refuses_what_other_networks_made(job: Path, override: str, option: str) -> None:
    precompute(job_config(job, "data.store_text=true"))
    write_first_stage(job / "other.safetensors", job_config(job), seed=1)
    config = job_config(
        job, "data.store_text=true", override.format(other=job / "other.safetensors")
    )
    with pytest.raises(ValueError, match=rf"^data\.latents: .* than {re.escape(option)}; set"):
        build_denoising(config, ALONE)


def test_latents_go_to_a_local_folder(job: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.latents: s3://bucket is no local folder"):
        precompute(job_config(job, "data.latents=s3://bucket"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 9))
def test_shards_are_cut_into_batches_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch_size: int
) -> None:
    shards = [
        Shard(name=f"{n}.tar", samples=size, size_bytes=0, sha256="", index_sha256="")
        for n, size in enumerate(sizes)
    ]
    images = Manifest(kind=Kind.images, shards=shards)
    place = str(tmp_path_factory.mktemp("latents"))
    with closing(LatentFolder(place, images, {})) as folder:
        pieces = list(cut(images, shards, batch_size, folder, EncodingProgress(sum(sizes))))
    assert np.concatenate([piece.samples for piece in pieces]).tolist() == list(range(sum(sizes)))
    assert [piece.source for piece in pieces if piece.last] == shards
    for piece, following in pairwise(pieces):
        assert piece.last == (piece.source != following.source)
        assert len(piece.samples) == batch_size or piece.last


def test_a_log_file_gets_lines_with_rate_share_and_time_left(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_terminal_gets_a_bar(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    precompute(job_config(job))
    last = terminal.getvalue().split("\r")[-1]
    assert "26/26" in last
    assert re.search(r"image/s, encoder \d+%", last)


def test_annotations_are_cropped_with_the_pictures(tmp_path: Path) -> None:
    """Pictures of 24 x 16 become squares of 16: a box at the left edge loses a part, or all."""
    with ShardSetWriter(tmp_path / "train", Kind.images, 4) as writer:
        for number in range(6):
            labels = np.full((16, 24), number, np.uint8)
            labels[:, 4:8] = 9
            picture = Image.fromarray(np.repeat(labels[..., None], 3, -1))
            boxes = [Box("edge", 0, 0, 1 / 6, 1), Box("cat", 0, 0.25, 0.5, 0.75)]
            members = {MAP: encode_map(labels), BOXES: encode_boxes(boxes)}
            writer.write({"png": encode_png(picture), "txt": b"x", **members})
    images = Manifest(
        kind=Kind.images,
        shards=writer.shards,
        map_classes=[str(number) for number in range(10)],
        box_classes=["cat", "edge"],
    )
    images.save(tmp_path / "train")
    config = job_config(tmp_path, "data.maps=true", "data.boxes=true", "data.flip=true")
    write_first_stage(tmp_path / "first_stage.safetensors", config)
    precompute(config)
    manifest = Manifest.load(tmp_path / "latents", option="data.latents")
    assert (manifest.map_classes, manifest.box_classes) == (
        images.map_classes,
        images.box_classes,
    )
    share = Share(seed=0, global_batch=2, micro_batch=2)
    batch = LatentStream.open(config.data, share).read(np.arange(6))
    assert batch.boxes == [[Box("cat", 0.0, 0.25, 0.5, 0.75)]] * 6
    for number, labels in enumerate(batch.arrays["map"].numpy()):
        assert (labels[:, :4] == 9).all()
        assert (labels[:, 4:] == number).all()
    plain = job_config(tmp_path, "data.maps=true", "data.flip=true")
    with pytest.raises(ValueError, match=r"data\.maps or data\.boxes"):
        precompute(plain)
