"""What runs in a process that tests/support/processes.py forks."""

import atexit
import os
import runpy
import sys
from pathlib import Path

import torch

from tests.support.paths import ROOT


def run_module(
    module: str, words: list[str], environment: dict[str, str], out: Path, err: Path
) -> None:
    """Do what `python -m MODULE WORDS…` does, and print into two files."""
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
