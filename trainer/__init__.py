"""Runs: the only package that knows both the models and the data."""

import signal
import sys

# `python -m trainer…` imports this first. Ctrl-C then ends the process at once, without a stack
# trace, until the command handles it (trainer/train/stop.py): every command may be killed anywhere.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
