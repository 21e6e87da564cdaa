"""The cache: fetched once, verified, bounded, and never at the cost of what is in use."""

import errno
import hashlib
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import fsspec
import pytest

from data.config import CacheConfig
from data.shards.cache import GIB, CacheFullError, FileCache, ListedFile, Prefetcher
from data.shards.manifest import ManifestError
from data.storage import remote

SIZE = 1000


def payload(number: int) -> bytes:
    return hashlib.shake_128(bytes([number])).digest(SIZE)


class Store:
    """Files 0, 1, 2, … of SIZE bytes each in fsspec's memory."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.fetched: Counter[str] = Counter()
        self.on_piece = lambda: None

    def file(
        self, number: int, *, sha256: str | None = None, size_bytes: int | None = SIZE
    ) -> ListedFile:
        location = f"{self.base}/{number}"
        store, path = fsspec.core.url_to_fs(location)
        if not store.exists(path):
            store.pipe_file(path, payload(number))
        if sha256 is None:
            sha256 = hashlib.sha256(payload(number)).hexdigest()
        return ListedFile(location=location, sha256=sha256, size_bytes=size_bytes)

    def replace(self, number: int, content: bytes) -> None:
        store, path = fsspec.core.url_to_fs(f"{self.base}/{number}")
        store.pipe_file(path, content)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(f"memory://{tmp_path.name}")
    read = remote.pieces

    def counted(location: str, size_bytes: int) -> Iterator[bytes]:
        store.fetched[location.rpartition("/")[2]] += 1
        for piece in read(location, size_bytes):
            store.on_piece()
            yield piece

    monkeypatch.setattr(remote, "pieces", counted)
    monkeypatch.setattr(remote, "PIECE_BYTES", 100)
    return store


def cache_of(folder: Path, files: float = 100) -> FileCache:
    return FileCache(CacheConfig(dir=str(folder), max_gib=files * SIZE / GIB))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"lock"}


def test_a_file_is_fetched_once_by_all_caches_of_a_folder(tmp_path: Path, store: Store) -> None:
    for _ in range(3):
        for number in range(4):
            assert bytes(cache_of(tmp_path / "c").map(store.file(number))) == payload(number)
    assert store.fetched == dict.fromkeys("0123", 1)
    assert names(tmp_path / "c") == {store.file(number).sha256 for number in range(4)}


def test_a_file_of_unknown_size_is_fetched(tmp_path: Path, store: Store) -> None:
    assert bytes(cache_of(tmp_path).map(store.file(1, size_bytes=None))) == payload(1)


def test_threads_that_need_a_file_at_once_fetch_it_once(tmp_path: Path, store: Store) -> None:
    store.on_piece = lambda: time.sleep(0.0005)
    cache, files, found = cache_of(tmp_path), [store.file(number) for number in range(20)], []
    threads = [
        threading.Thread(target=lambda: found.append([cache.map(file) for file in files]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(30)
    for mapped in found:
        assert [bytes(content) for content in mapped] == [payload(number) for number in range(20)]
    assert len(found) == 4
    assert set(store.fetched.values()) == {1}


def test_the_longest_unused_file_goes_first(tmp_path: Path, store: Store) -> None:
    cache = cache_of(tmp_path, 3)
    for number in (0, 1, 2, 0, 3):
        os.close(cache.hold(store.file(number)))
        time.sleep(0.01)  # more than a tick of the file system's clock
    assert names(tmp_path) == {store.file(number).sha256 for number in (0, 2, 3)}
    assert store.fetched == dict.fromkeys("0123", 1)


def test_what_is_mapped_or_held_stays(tmp_path: Path, store: Store) -> None:
    cache = cache_of(tmp_path, 3)
    mapped, handle = cache.map(store.file(0)), cache.hold(store.file(1))
    for number in range(2, 8):
        cache.map(store.file(number))
        assert len(names(tmp_path)) <= 3
    assert names(tmp_path) == {store.file(number).sha256 for number in (0, 1, 7)}
    assert bytes(mapped) == payload(0)
    os.close(handle)
    del mapped
    for number in range(2, 5):
        cache.map(store.file(number))
    assert names(tmp_path) == {store.file(number).sha256 for number in (2, 3, 4)}


def test_a_file_that_cannot_fit_names_the_option(tmp_path: Path, store: Store) -> None:
    with pytest.raises(CacheFullError, match=r"^data\.cache\.max_gib: .* do not hold .*/0 of "):
        cache_of(tmp_path, 0.5).map(store.file(0))
    assert names(tmp_path) == set()
    cache = cache_of(tmp_path, 2.5)
    mapped = [cache.map(store.file(number)) for number in (0, 1)]
    with pytest.raises(CacheFullError, match=r"^data\.cache\.max_gib"):
        cache.map(store.file(2))
    assert names(tmp_path) == {store.file(number).sha256 for number in (0, 1)}
    assert [bytes(content) for content in mapped] == [payload(0), payload(1)]


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync"])
def test_a_full_disk_names_the_option_and_leaves_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(CacheFullError, match=rf"^data\.cache\.dir: the disk of {tmp_path} has no"):
        cache_of(tmp_path).map(store.file(0))
    assert names(tmp_path) == set()


def test_a_full_disk_takes_the_room_of_what_nobody_uses(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path)
    mapped = [cache.map(store.file(number)) for number in range(5)]
    del mapped[1:4]
    allocate, room = os.posix_fallocate, 3

    def small_disk(handle: int, offset: int, length: int) -> None:
        if len(names(tmp_path)) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(handle, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    assert bytes(cache.map(store.file(9))) == payload(9)
    assert names(tmp_path) == {store.file(number).sha256 for number in (0, 4, 9)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (payload(7), r"/0 is not the file of the manifest: its hash differs"),
        (payload(0)[:-1], r"/0 has 999 bytes, but the manifest says 1000"),
        (payload(0) + b"x", r"/0 has 1001 bytes, but the manifest says 1000"),
    ],
)
def test_another_file_on_the_store_is_refused_and_not_kept(
    tmp_path: Path, store: Store, content: bytes, message: str
) -> None:
    file = store.file(0)
    store.replace(0, content)
    with pytest.raises(ManifestError, match=message):
        cache_of(tmp_path).map(file)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", ["", "0" * 63, "../" + "0" * 61, "G" * 64, "0" * 64 + "\n"])
def test_a_name_that_is_no_hash_is_refused(tmp_path: Path, store: Store, name: str) -> None:
    with pytest.raises(ManifestError, match="is no SHA-256"):
        cache_of(tmp_path).map(store.file(0, sha256=name))
    assert store.fetched == {}


def test_files_of_others_are_left_alone(tmp_path: Path, store: Store) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(5 * SIZE))
    (tmp_path / "notes.part").write_bytes(b"1")
    (tmp_path / ("0" * 64 + ".txt")).write_bytes(b"1")
    before = names(tmp_path)
    cache = cache_of(tmp_path, 2)
    for number in range(5):
        cache.map(store.file(number))
    assert names(tmp_path) > before
    assert len(names(tmp_path) - before) == 2


def test_a_file_deleted_or_cut_behind_our_back_is_fetched_again(
    tmp_path: Path, store: Store
) -> None:
    cache, file = cache_of(tmp_path), store.file(0)
    mapped = cache.map(file)
    (tmp_path / file.sha256).unlink()
    assert bytes(cache.map(file)) == bytes(mapped) == payload(0)
    (tmp_path / file.sha256).write_bytes(b"cut")
    assert bytes(cache.map(file)) == payload(0)
    assert store.fetched == {"0": 3}


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, store: Store) -> None:
    left, cache = store.file(1).sha256 + ".part", cache_of(tmp_path)
    (tmp_path / left).write_bytes(bytes(500))
    cache.map(store.file(0))
    assert names(tmp_path) == {store.file(0).sha256}
    (tmp_path / left).write_bytes(bytes(2 * SIZE))
    assert bytes(cache.map(store.file(1))) == payload(1)
    assert names(tmp_path) == {store.file(0).sha256, store.file(1).sha256}


def test_a_folder_that_cannot_be_made_names_the_option(tmp_path: Path, store: Store) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"^data\.cache\.dir: .*file"):
        cache_of(tmp_path / "file" / "cache").map(store.file(0))


def test_the_default_folder_is_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    FileCache(CacheConfig()).map(store.file(0))
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"latent-foundry-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(
    tmp_path: Path, store: Store, mode: int
) -> None:
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    victim.write_text("precious")
    folder.mkdir()
    (folder / (store.file(0).sha256 + ".part")).symlink_to(victim)
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=r"^data\.cache\.dir: other users can write to"):
        cache_of(folder).map(store.file(0))
    assert victim.read_text() == "precious"


def test_what_another_user_left_in_the_folder_is_not_believed(tmp_path: Path, store: Store) -> None:
    """The folder was open to others before; its files lie there under good names."""
    victim, cache = tmp_path / "victim", cache_of(tmp_path / "cache")
    victim.write_text("precious")
    first, second, third = (store.file(number) for number in range(3))
    (tmp_path / "cache").mkdir(mode=0o700)
    planted = tmp_path / "cache" / first.sha256
    planted.write_bytes(bytes(SIZE))
    planted.chmod(0o666)
    assert bytes(cache.map(first)) == payload(0)
    (tmp_path / "cache" / f"{second.sha256}.part").symlink_to(victim)
    with pytest.raises(OSError, match=r"^data\.cache\.dir: .*part"):
        cache.map(second)
    (tmp_path / "cache" / third.sha256).symlink_to(victim)
    with pytest.raises(OSError, match=r"^data\.cache\.dir: "):
        cache.map(third)
    assert victim.read_text() == "precious"


def held(prefetcher: Prefetcher, count: int) -> set[str]:
    """Wait until the prefetcher has so many files."""
    deadline_s = time.monotonic() + 20
    while len(prefetcher._held) != count and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return set(prefetcher._held)


def test_the_prefetcher_fetches_in_order_and_lets_go_of_what_is_not_wanted(
    tmp_path: Path, store: Store
) -> None:
    order = []
    store.on_piece = lambda: order.append(list(store.fetched)[-1])
    cache = cache_of(tmp_path, 8)
    files = [store.file(number) for number in range(8)]
    prefetcher = Prefetcher(cache)
    prefetcher.want([files[3], files[0], files[2]])
    assert len(held(prefetcher, 3)) == 3
    assert list(dict.fromkeys(order)) == ["3", "0", "2"]
    for number in (4, 5, 6, 7, 1, 4, 5, 6):
        cache.map(files[number])
    assert names(tmp_path) >= {files[number].sha256 for number in (3, 0, 2)}
    prefetcher.want([files[2]])
    assert held(prefetcher, 1) == {files[2].sha256}
    small = cache_of(tmp_path, 1)
    with pytest.raises(CacheFullError):
        small.map(store.file(9))
    assert names(tmp_path) == {files[2].sha256}
    prefetcher.close()
    small.map(store.file(9))
    assert names(tmp_path) == {store.file(9).sha256}


@pytest.mark.parametrize("others", [0, 6])
def test_fetching_ahead_leaves_room_for_what_is_read_now(
    tmp_path: Path, store: Store, others: int
) -> None:
    cache = cache_of(tmp_path, 6)
    for number in range(20, 20 + others):
        cache.map(store.file(number))
    prefetcher = Prefetcher(cache)
    prefetcher.want([store.file(number) for number in range(6)])
    assert len(held(prefetcher, 3)) == 3
    prefetcher._pool.submit(lambda: None).result(20)
    mapped = [cache.map(store.file(number)) for number in range(10, 13)]
    assert len(prefetcher._held) == len(mapped) == 3
    assert len(names(tmp_path)) == 6
    prefetcher.close()


def test_a_prefetcher_leaves_errors_to_those_who_need_the_file(
    tmp_path: Path, store: Store
) -> None:
    cache = cache_of(tmp_path)
    bad = store.file(0)
    store.replace(0, payload(5))
    prefetcher = Prefetcher(cache)
    prefetcher.want([store.file(1), bad, store.file(2)])
    prefetcher._pool.submit(lambda: None).result(20)
    assert held(prefetcher, 1) == {store.file(1).sha256}
    with pytest.raises(ManifestError):
        cache.map(bad)
    prefetcher.want([store.file(2)])
    assert held(prefetcher, 1) <= {store.file(1).sha256, store.file(2).sha256}
    prefetcher.close()


def test_closing_a_prefetcher_breaks_its_fetch_off(tmp_path: Path, store: Store) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        go_on.wait(20)

    store.on_piece = wait
    prefetcher = Prefetcher(cache_of(tmp_path))
    prefetcher.want([store.file(0)])
    assert started.wait(20)
    threading.Timer(0.05, go_on.set).start()
    prefetcher.close()
    assert names(tmp_path) == set()
    assert store.fetched == {"0": 1}


def test_a_worker_does_not_inherit_what_is_held(tmp_path: Path, store: Store) -> None:
    cache, fork = cache_of(tmp_path, 2), multiprocessing.get_context("fork")
    prefetcher = Prefetcher(cache)
    prefetcher.want([store.file(0)])
    assert len(held(prefetcher, 1)) == 1
    done = fork.Event()
    worker = fork.Process(target=done.wait, args=(60,))
    worker.start()
    prefetcher.close()
    time.sleep(0.2)
    for number in (1, 2):
        cache.map(store.file(number))
    assert names(tmp_path) == {store.file(number).sha256 for number in (1, 2)}
    done.set()
    worker.join(20)
    assert worker.exitcode == 0
