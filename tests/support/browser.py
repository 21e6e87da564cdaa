"""A real browser for the pages that we write: Debian's Chromium, without a window."""

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """The browser's command, installed first where it is missing and this is root on Debian.

    Skips the test where there is none to be had; a CI has to have one.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "--yes", "--no-install-recommends", NAMES[0]]):
            subprocess.run(["apt-get", "-qq", *words], env=environment, check=True)
        found = shutil.which(NAMES[0])
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium, and it cannot be installed here")
        pytest.skip("there is no Chromium")
    return found


def open_page(path: Path, *, width: int = 1200) -> tuple[str, str, bytes]:
    """Open an HTML file without a network: its DOM when it is loaded, its log, a PNG of it."""
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        done = subprocess.run(
            [
                *(find_browser(), "--headless", "--no-sandbox", "--disable-gpu"),
                *(f"--user-data-dir={folder}/profile", "--proxy-server=127.0.0.1:9"),
                *("--enable-logging=stderr", "--log-level=0", f"--window-size={width},1600"),
                *(f"--screenshot={picture}", "--dump-dom", path.resolve().as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, done.stderr, picture.read_bytes()
