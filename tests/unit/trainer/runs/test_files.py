"""The small files of a run folder, on disks that fail and come back."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.runs import files as run_files
from trainer.runs import outages as run_outages
from trainer.runs.files import RunFiles

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other in hundredths of a second."""
    monkeypatch.setattr(run_outages, "FIRST_RETRY_S", 0.005)
    monkeypatch.setattr(run_outages, "LONGEST_RETRY_S", 0.02)


def block(path: Path) -> None:
    """Let writing to a path fail, also for root: a folder is in its place."""
    path.mkdir()
    (path / "stone").touch()


def unblock(path: Path) -> None:
    (path / "stone").unlink()
    path.rmdir()


def history(folder: Path) -> list[str]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["what"] for line in lines]


def wait_for_failure(files: RunFiles, path: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not files._files[path].failed:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_lines_and_files_are_written_in_order(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    numbers = [str(number) for number in range(1000)]
    for number in numbers:
        files.append("metrics.jsonl", number)
        files.replace(tmp_path / "samples" / "last", number.encode())
    assert files.close() == ""
    assert (tmp_path / "metrics.jsonl").read_text().split() == numbers
    assert (tmp_path / "samples" / "last").read_text() == "999"
    files.append("metrics.jsonl", "after the end")
    assert files.flush(PATIENCE_S)


def test_the_thread_ends_without_jobs_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.runs.files.IDLE_S", 0.0)
    files = RunFiles(tmp_path)
    for number in range(300):
        files.append("metrics.jsonl", str(number))
        if number % 3 == 0:
            assert files.flush(PATIENCE_S)
    deadline_s = time.monotonic() + PATIENCE_S
    while files._thread is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    files.append("metrics.jsonl", "300")
    assert files.close() == ""
    lines = (tmp_path / "metrics.jsonl").read_text().split()
    assert lines == [str(number) for number in range(301)]


def test_what_cannot_be_written_waits_and_the_history_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, files = tmp_path / "metrics.jsonl", RunFiles(tmp_path)
    block(path)
    numbers = [str(number) for number in range(300)]
    for number in numbers[:200]:
        files.append(path.name, number)
    files.replace(tmp_path / "picture", b"1")
    wait_for_failure(files, path)
    assert files.unwritten() == {path.name: numbers[:200]}
    assert files.flush(PATIENCE_S, past_failures=False)
    assert (tmp_path / "picture").exists()  # one bad file does not hold up another
    time.sleep(0.1)
    unblock(path)
    for number in numbers[200:]:
        files.append(path.name, number)
    assert files.close(PATIENCE_S) == ""
    assert path.read_text().split() == numbers
    (event,) = history(tmp_path)
    assert re.search(r"metrics\.jsonl is written, after \d+ failed attempts in \d+ s", event)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # once a minute, and its end
    assert re.search(
        rf"^warning: {path} cannot be written: Is a directory; [\d,]+ bytes free; "
        r"the run goes on, and \d+ records and files wait in memory$",
        said[0],
    )


def test_memory_is_bounded_and_what_it_cannot_hold_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_files, "WAITING_BYTES", 1000)
    files, path, picture = RunFiles(tmp_path), tmp_path / "metrics.jsonl", tmp_path / "picture"
    block(path)
    block(picture)
    files.replace(picture, bytes(900))
    wait_for_failure(files, picture)
    for number in range(100, 300):
        files.append(path.name, f"{number} 3456789")
    waiting = files.unwritten()[path.name]
    assert waiting == [f"{number} 3456789" for number in range(100, 183)]  # 83 x 12 bytes
    assert files.lost == 117 + 1  # the picture made room
    assert f"{path}, 118 records and files that memory could not hold" in files.close()
    assert "error: not written: " in capsys.readouterr().err
    unblock(path)


def test_a_newer_file_takes_the_place_of_one_that_waits(tmp_path: Path) -> None:
    files, path = RunFiles(tmp_path), tmp_path / "quarantine.jsonl"
    block(path)
    for number in range(50):
        files.replace(path, f"{number}".encode())
    assert len(files._files[path].jobs) == 1
    unblock(path)
    assert files.close(PATIENCE_S) == ""
    assert path.read_text() == "49"


def test_lines_that_a_checkpoint_took_along_come_back_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("1\n2\n")
    files = RunFiles(tmp_path)
    files.restore({"metrics.jsonl": ["2", "3"], "incidents.jsonl": ["{}"]})
    assert files.close() == ""
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert (tmp_path / "incidents.jsonl").read_text() == "{}\n"


def test_a_run_folder_that_is_away_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    files = RunFiles(folder)
    files.append("metrics.jsonl", "1")
    files.replace(folder / "samples" / "a", b"1")
    wait_for_failure(files, folder / "metrics.jsonl")
    wait_for_failure(files, folder / "samples" / "a")
    assert not folder.exists()
    folder.mkdir()
    assert files.close(PATIENCE_S) == ""
    assert (folder / "samples" / "a").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    files = RunFiles(tmp_path, writes=False)
    files.append("metrics.jsonl", "1")
    files.note("something")
    files.mend("incidents.jsonl")
    assert threading.active_count() == before
    assert files.close() == ""
    assert not list(tmp_path.iterdir())


def test_what_waits_at_a_sudden_end_is_still_written(tmp_path: Path) -> None:

    code = (
        "import sys; from pathlib import Path; from trainer.runs.files import RunFiles\n"
        "files = RunFiles(Path(sys.argv[1]))\n"
        "for number in range(1000): files.append('metrics.jsonl', str(number))\n"
        "raise SystemExit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert ended.returncode == 3
    assert len((tmp_path / "metrics.jsonl").read_text().split()) == 1000


def test_half_a_line_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_bytes(b'{"what": "a"}\n{"wh\xff\x00\n{"what": "\xff"}\n{"what')
    files = RunFiles(tmp_path)
    files.mend(path.name)
    files.append(path.name, '{"what": "b"}')
    assert files.close() == ""
    assert path.read_bytes() == b'{"what": "a"}\n{"what": "\xff"}\n{"what": "b"}\n'
