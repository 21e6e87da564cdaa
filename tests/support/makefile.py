"""What a target of the Makefile would run."""

import os
import subprocess

from tests.support.paths import ROOT


def commands(target: str, *words: str) -> list[str]:
    """The commands of ``make target words``, installation apart; none of them is run.

    The suite is itself run by ``make test``: what that ``make`` hands on to another one (its
    flags, its level) is taken away, or the lines would depend on who started the tests.
    """
    options = ["--no-print-directory", "--dry-run", "--old-file=.venv/installed"]
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    env = {name: value for name, value in os.environ.items() if name not in outer}
    listed = subprocess.run(
        ["make", *options, target, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.strip() for line in listed.stdout.splitlines()]
