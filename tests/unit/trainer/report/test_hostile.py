"""A report on a stranger's run folder: nothing from outside, no other program, no hang."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.storage.atomic import write_atomic
from tests.support.pages import page_of, write_run
from trainer.report.job import report
from trainer.runs.history import MOST_SERIES, read_metrics
from trainer.runs.paths import CHECKPOINTS, CONFIG, MANIFEST, METRICS, QUARANTINE, SAMPLES, VERSIONS
from trainer.runs.sweeps import TABLE

SECRET = "TOPSECRET"
PICTURE = f"{SAMPLES}/step_00000001.png"
CHECKPOINT = f"{CHECKPOINTS}/step_00000001/{MANIFEST}"
SWEEP = f"sweeps/x/{TABLE}"
PLACES = [CONFIG, VERSIONS, QUARANTINE, PICTURE, CHECKPOINT, SWEEP]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 9))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", steps_with_picture=())
    for place in PLACES:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).unlink(missing_ok=True)
    return folder


def content_of(place: str, folder: Path) -> Path:
    """A file outside of the run that would show up, were it read as `place`."""
    path = folder / Path(place).name
    if place == PICTURE:
        Image.new("RGB", (8, 8)).save(path)
    elif place == SWEEP:
        table = pa.table({"fd_inception": [1.0], SECRET: ["x"]})
        pq.write_table(table.replace_schema_metadata({"swept": json.dumps([SECRET])}), path)
    else:
        about = {"files": {"a": {"bytes": 5 * 2**30}}, "reason": SECRET, "key": SECRET, "a": SECRET}
        path.write_text(json.dumps(about))
    return path


def shown(run: Path) -> str:
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    return page if SECRET in page or "data:image" in page or "step_00000001" in page else ""


@pytest.mark.parametrize("place", PLACES)
def test_links_out_of_the_run_are_not_read(run: Path, tmp_path: Path, place: str) -> None:
    outside = content_of(place, tmp_path)
    (run / place).write_bytes(outside.read_bytes())
    assert shown(run), "the file would be shown if it lay in the run"
    (run / place).unlink()
    (run / place).symlink_to(outside)
    assert not shown(run)
    (run / place).unlink()
    if "/" in place:
        (run / place).parent.rmdir()
        (run / place).parent.symlink_to(tmp_path)
        assert not shown(run)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def enlarge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


IRREGULAR: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bind,
    "a terabyte": enlarge,
}


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_small_file_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    monkeypatch.chdir((run / place).parent)  # the names of sockets are short
    IRREGULAR[kind](run / place)
    assert not shown(run)


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_log_that_is_no_small_file_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(run)
    (run / METRICS).unlink()
    IRREGULAR[kind](run / METRICS)
    assert report([str(run)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and METRICS in errors


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "task: !!bool x",
        "task: !!timestamp x",
        "task: !!int ''",
        "[" * 10_000,
        "a: 0x" + "f" * 9999,
    ],
    ids=lambda text: text[:20],
)
def test_a_config_of_nonsense_still_gives_a_page(run: Path, text: str) -> None:
    (run / CONFIG).write_text(text)
    assert "Training" in page_of(run).text


@pytest.mark.parametrize("size", ['"x"', "null", "9" * 400, "-1", "1.5", "[]"])
def test_sizes_that_cannot_be_are_counted_as_nothing(run: Path, size: str) -> None:
    (run / CHECKPOINT).write_text(f'{{"files": {{"a": {{"bytes": {size}}}}}}}')
    os.utime(run / CHECKPOINT, (0, 0))
    assert "step_00000001 1970-01-01 00:00 0 1" in page_of(run).text


@pytest.mark.parametrize("image_format", ["EPS", "PPM", "TGA", "PDF"])
def test_other_formats_are_no_pictures(
    run: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    tools = run / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {run}/ran\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    if image_format == "EPS":
        (run / PICTURE).write_bytes(EPS)
    else:
        Image.new("RGB", (8, 8)).save(run / PICTURE, image_format)
    page = page_of(run)
    assert "1 unreadable picture left out" in page.text
    assert not (run / "ran").exists()


def test_the_page_is_written_through_no_link(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "bashrc"
    victim.write_text("precious\n")
    (run / "report.html").symlink_to(victim)
    page_of(run)
    assert victim.read_text() == "precious\n"
    assert not (run / "report.html").is_symlink()


def test_a_hidden_file_that_becomes_a_link_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, touch = tmp_path / "bashrc", Path.touch
    victim.write_text("precious\n")

    def replace(path: Path, exist_ok: bool = True) -> None:
        touch(path, exist_ok=exist_ok)
        path.unlink()
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "touch", replace)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "report.html", b"other")
    assert victim.read_text() == "precious\n"


def test_a_log_of_endless_keys_is_cut() -> None:
    text = "\n".join(json.dumps({"step": n, f"train/{n}": 1.0}) for n in range(2 * MOST_SERIES))
    series, damaged = read_metrics(text)
    assert len(series) == MOST_SERIES and not damaged
