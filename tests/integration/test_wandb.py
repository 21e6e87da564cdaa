"""W&B that refuses, hangs or works: a run is the same, and the key is in no file."""

import http.server
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import run_command
from tests.support.workshop import Workshop, losses
from trainer.train.loop import fit

KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN = ["train.max_steps=4", "checkpoint.every=2", "logger.wandb.mode=online"]


@contextmanager
def service(hangs: bool) -> Generator[tuple[str, list[str]]]:
    """A local W&B that answers 401, or never; yields its address and the requests it got."""
    asked: list[str] = []
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            if hangs:
                over.wait()
            else:
                self.send_error(401)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def alone(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run without W&B."""
    run = tmp_path_factory.mktemp("alone")
    assert fit(workshop.config("emoji", *TRAIN, "logger.wandb.mode=disabled", run=run)) == 0
    return losses(run)


def test_a_run_that_is_offline_asks_nothing_of_the_service(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = workshop.overrides("emoji", *TRAIN[:2], "logger.wandb.mode=auto", run=tmp_path)
    with service(False) as (address, asked):
        done = run_command(
            "trainer",
            *words,
            WANDB_API_KEY=KEY,
            WANDB_BASE_URL=address,
            WANDB_MODE="offline",
            HOME=str(tmp_path),
        )
    assert done.code == 0, done.err
    assert asked == []
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("hangs", [False, True])
def test_a_service_that_refuses_or_hangs_harms_nothing_and_no_file_has_the_key(
    hangs: bool, workshop: Workshop, alone: dict[int, float], tmp_path: Path
) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    with service(hangs) as (address, asked):
        done = run_command(
            "trainer",
            *workshop.overrides("emoji", *TRAIN, run=run),
            WANDB_API_KEY=KEY,
            WANDB_BASE_URL=address,
            HOME=str(home),
        )
    assert done.code == 0, done.err
    assert asked
    assert "warning: W&B" in done.err
    assert losses(run) == alone
    if not hangs:  # a refusal is answered at once: the rest is kept for `wandb sync`
        (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        assert b"train/loss" in record.read_bytes()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    assert KEY not in done.said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
