"""A child process ends with its parent, whatever ends it, and leaves Ctrl-C to it."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.groups import members, wait_for_members
from tests.support.paths import ROOT

FAMILY = """
import os, signal, sys
from data.child_process import end_with_parent
parent = os.getpid()
for _ in range(2):
    if os.fork() == 0:
        end_with_parent(parent)
        print(flush=True)
        signal.pause()
        sys.exit()
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_children_end_with_their_parent(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        for _ in range(2):
            parent.stdout.readline()
        assert len(members(parent.pid)) == 3
        os.kill(parent.pid, number)
        parent.wait()
        wait_for_members(parent.pid, 0)


def test_a_child_with_work_to_save_is_asked_to_stop() -> None:
    script = """
import os, signal, sys
from data.child_process import stop_with_parent, stops_with_parent
parent = os.getpid()
assert not stops_with_parent()
if os.fork():
    signal.pause()
signal.signal(signal.SIGTERM, lambda *_: print("saved", stops_with_parent(), flush=True))
stop_with_parent(parent)
print("ready", flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "saved True\n"


def test_a_child_leaves_ctrl_c_to_its_parent() -> None:
    script = """
import os, signal, sys
from data.child_process import end_with_parent
end_with_parent(os.getppid())
os.kill(os.getpid(), signal.SIGINT)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"alive\n"


def test_an_orphan_ends_at_once() -> None:
    script = "import data.child_process as c; c.end_with_parent(1); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")
