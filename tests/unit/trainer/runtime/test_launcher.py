"""What exit codes mean, as the job scripts print it."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from trainer.runtime.launcher import CRASH_EXIT_CODE, MEANINGS, meaning


@pytest.mark.parametrize(
    ("code", "words"),
    [(137, "killed by SIGKILL"), (139, "killed by SIGSEGV"), (2, "unknown"), (255, "unknown")],
)
def test_signals_have_names(code: int, words: str) -> None:
    assert meaning(code) == words


def test_a_script_gets_the_words() -> None:
    words = [sys.executable, "-m", "trainer.runtime.launcher", str(CRASH_EXIT_CODE)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{MEANINGS[CRASH_EXIT_CODE]}\n"
