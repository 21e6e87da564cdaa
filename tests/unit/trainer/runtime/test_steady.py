"""Prints that fail do not end a run."""

import shlex
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from trainer.runtime.steady import steady_output
steady_output()
for number in range(10_000):
    print("a line of a log", number, flush=True)
    print("a warning", number, file=sys.stderr)
assert sys.stdout.fileno() == 1
Path(sys.argv[1]).write_text("trained")
"""


def test_a_run_outlives_the_disk_of_its_log(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", CODE, done], stdout=full, stderr=full, check=False
        )
    assert ended.returncode == 0
    assert done.read_text() == "trained"


def test_a_run_outlives_the_reader_of_its_log(tmp_path: Path) -> None:
    done = tmp_path / "done"
    program = shlex.join([sys.executable, "-c", CODE, str(done)])
    command = f"{program} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "a line of a log 0\n"
    assert done.read_text() == "trained"
