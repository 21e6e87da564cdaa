"""W&B that refuses, hangs or works: a run is the same, and the key is in no file."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Workshop, losses
from trainer.loop import fit

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN = ["train.max_steps=4", "checkpoint.every=2", "logger.wandb.mode=online"]


@contextmanager
def service(hangs: bool) -> Iterator[tuple[str, list[str]]]:
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


@pytest.fixture(scope="module")
def alone(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run without W&B."""
    run = tmp_path_factory.mktemp("alone")
    assert fit(workshop.config("emoji", *TRAIN, "logger.wandb.mode=disabled", run=run)) == 0
    return losses(run)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_service_that_refuses_or_hangs_harms_nothing_and_no_file_has_the_key(
    hangs: bool, workshop: Workshop, alone: dict[int, float], tmp_path: Path
):
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    with service(hangs) as (address, asked):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *workshop.overrides("emoji", *TRAIN, run=run)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "WANDB_API_KEY": KEY,
                "WANDB_BASE_URL": address,
                "HOME": str(home),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert asked
    assert "warning: W&B" in done.stderr
    assert losses(run) == alone
    if not hangs:  # a refusal is answered at once: the rest is kept for `wandb sync`
        (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        assert b"train/loss" in record.read_bytes()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    assert KEY not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
