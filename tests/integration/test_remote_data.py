"""A data set on a real S3 server that fails in every way: the epoch is that of the local files."""

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import numpy as np
import pytest

from data.shards.cache import GIB
from data.shards.codecs import encode_npy
from data.shards.manifest import Kind, LatentInfo, Manifest, ManifestError
from data.shards.writer import ShardSetWriter
from data.storage import remote
from tests.support.remote_sets import (
    SAMPLES,
    SHARD_SAMPLES,
    SHARDS,
    Epoch,
    cached,
    config_of,
    epoch,
)
from tests.support.s3_server import KEY, SECRET, Proxy, S3Server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a set of latents."""
    folder = tmp_path_factory.mktemp("s3")
    draws = np.random.default_rng(0)
    with ShardSetWriter(folder / "bucket" / "set", Kind.latents, SHARD_SAMPLES) as writer:
        for number in range(SAMPLES):
            array = draws.standard_normal((2, 4, 8, 8)).astype(np.float16)
            writer.write({"moments.npy": encode_npy(array), "txt": f"caption {number}".encode()})
    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[4, 8, 8], mean=[0.0] * 4, std=[1.0] * 4
    )
    Manifest(kind=Kind.latents, shards=writer.shards, latents=info).save(folder / "bucket" / "set")
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[S3Server]:
    server = S3Server(home)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"key": KEY, "secret": SECRET, "endpoint_url": proxy.url}
    )
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.1)
    with proxy.serving():
        yield proxy


@pytest.fixture(scope="module")
def expected(home: Path) -> Epoch:
    return epoch(config_of(str(home / "bucket" / "set"), home / "unused"))


def tars(counts: dict[str, int]) -> dict[str, int]:
    return {path: count for path, count in counts.items() if path.endswith(".tar")}


REMOTE = "s3://bucket/set"


def test_an_epoch_fetches_each_file_once(proxy: Proxy, tmp_path: Path, expected: Epoch) -> None:
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    assert len(proxy.gets) == 2 * SHARDS + 1
    assert set(proxy.gets.values()) == {1}
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    assert sum(tars(proxy.gets).values()) == SHARDS


def test_a_server_that_is_stopped_for_a_while(
    server: S3Server,
    proxy: Proxy,
    tmp_path: Path,
    expected: Epoch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 10.0)
    restart, first = threading.Timer(0.5, server.start), threading.Lock()

    def stop(path: str) -> None:
        if len(tars(proxy.gets)) >= SHARDS // 2 and first.acquire(blocking=False):
            server.stop()
            restart.start()

    proxy.on_get = stop
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    restart.join()
    assert any(message.startswith(f"data: {REMOTE}/") for message in caplog.messages)


def test_a_server_that_answers_503_for_a_while(
    proxy: Proxy, tmp_path: Path, expected: Epoch, caplog: pytest.LogCaptureFixture
) -> None:
    refused: Counter[str] = Counter()

    def status(path: str) -> int | None:
        refused[path] += 1
        return 503 if refused[path] <= 2 else None

    proxy.status = status
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    assert len(caplog.messages) == 2 * len(refused)
    assert set(proxy.gets.values()) == {1}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 8000)


@pytest.mark.usefixtures("small_pieces")
def test_transfers_that_are_cut_go_on_where_they_were(
    proxy: Proxy, tmp_path: Path, expected: Epoch, caplog: pytest.LogCaptureFixture
) -> None:
    cuts: dict[str, int] = {}

    def cut(path: str) -> int | None:
        cuts[path] = cuts.get(path, 0) + 1
        return 3000 if cuts[path] % 2 else None

    proxy.cut = cut
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    assert len(caplog.messages) >= 2 * SHARDS
    sizes = {file.name: file.stat().st_size for file in cached(tmp_path)}
    sent = sum(tars(proxy.sent_bytes).values())
    assert sent < 1.5 * sum(sizes.values())


@pytest.mark.parametrize("fault", ["missing", "cut off", "replaced"])
def test_a_shard_that_is_not_there_is_named(
    home: Path, proxy: Proxy, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(home / "bucket" / "set", home / "other" / fault)
    shard = home / "other" / fault / "000003.tar"
    content = shard.read_bytes()
    shard.unlink()
    if fault != "missing":
        damaged = content[:-512] if fault == "cut off" else content[:-1] + b"x"
        shard.write_bytes(damaged)
    messages = {
        "missing": "lists this shard, but .* is not there",
        "cut off": "bytes, but the manifest says",
        "replaced": "is not the file of the manifest",
    }
    with pytest.raises(ManifestError, match=rf"{fault}/000003\.tar.*{messages[fault]}"):
        epoch(config_of(f"s3://other/{fault}", tmp_path))
    assert caplog.messages == []


def test_a_small_cache_stays_within_its_bound(
    home: Path, proxy: Proxy, tmp_path: Path, expected: Epoch
) -> None:
    files = list((home / "bucket" / "set").glob("*.tar*"))
    shard_bytes = sum(file.stat().st_size for file in files) / SHARDS
    bound = 6.5 * shard_bytes
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            try:
                most = max(most, sum(file.stat().st_size for file in cached(tmp_path)))
            except FileNotFoundError:
                continue

    done, watcher = threading.Event(), threading.Thread(target=watch)
    watcher.start()
    try:
        assert epoch(config_of(REMOTE, tmp_path, bound / GIB)) == expected
    finally:
        done.set()
        watcher.join()
    assert 3 * shard_bytes < most <= bound


def test_a_cache_too_small_for_what_is_read_at_once_names_the_option(
    proxy: Proxy, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"^data\.cache\.max_gib: "):
        epoch(config_of(REMOTE, tmp_path, 20_000 / GIB))


FULL_DISK = """
import json, subprocess, sys
import fsspec.config
folder, location, options = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k,mode=700", "tmpfs", folder], check=True)
fsspec.config.conf["s3"] = json.loads(options)
from pathlib import Path
from tests.support.remote_sets import cached, config_of, epoch
found = epoch(config_of(location, Path(folder), lanes=1))
print(json.dumps([[batch[0], batch[3].hex()] for batch in found]))
"""


def test_a_full_disk_makes_room(home: Path, proxy: Proxy, tmp_path: Path) -> None:
    local = epoch(config_of(str(home / "bucket" / "set"), tmp_path, lanes=1))
    arguments = [str(tmp_path), REMOTE, json.dumps(fsspec.config.conf["s3"])]
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [[batch[0], batch[3].hex()] for batch in local]
    assert sum(proxy.sent_bytes.values()) > 200 * 1024


def test_ranks_of_a_node_fetch_each_shard_once(
    proxy: Proxy, tmp_path: Path, expected: Epoch
) -> None:
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()

    def read(rank: int) -> None:
        found.put((rank, epoch(config_of(REMOTE, tmp_path), rank=rank, world=2)))

    ranks = [fork.Process(target=read, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    halves = dict(found.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(20)
    for whole, first, second in zip(expected, halves[0], halves[1], strict=True):
        for field, part in enumerate(whole):
            assert first[field] + second[field] == part
    assert set(tars(proxy.gets).values()) == {1}
    assert len(tars(proxy.gets)) == SHARDS


def test_a_killed_fetch_leaves_nothing_wrong(
    proxy: Proxy, tmp_path: Path, expected: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 8000)
    fork, fetching = multiprocessing.get_context("fork"), threading.Event()
    pieces: dict[str, int] = {}

    def hang(path: str) -> None:
        pieces[path] = pieces.get(path, 0) + 1
        if path.endswith(".tar") and pieces[path] == 3 and not fetching.is_set():
            fetching.set()
            time.sleep(1)

    proxy.on_get = hang
    reader = fork.Process(target=epoch, args=(config_of(REMOTE, tmp_path),))
    reader.start()
    assert fetching.wait(30)
    os.kill(reader.pid or 0, signal.SIGKILL)
    reader.join()
    assert ".part" in [file.suffix for file in cached(tmp_path)]
    assert epoch(config_of(REMOTE, tmp_path)) == expected
    assert ".part" not in [file.suffix for file in cached(tmp_path)]


def test_a_plain_web_server_without_ranges(
    home: Path, tmp_path: Path, expected: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(remote, "PIECE_BYTES", 8000)
    handler = functools.partial(Quiet, directory=home / "bucket")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.05,))
        thread.start()
        found = epoch(config_of(f"http://127.0.0.1:{web.server_port}/set", tmp_path))
        web.shutdown()
        thread.join()
    assert found == expected
