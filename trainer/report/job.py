"""The command line of a report. It names folders, and composes no config."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.runtime.output import clean_output


def report(words: Sequence[str], *, about: str | None = None) -> int:
    """Write RUN_FOLDER/report.html and print its path.

    words: the command line without the name of the command; about: the text of --help.
    Returns the exit code: 0 done, 1 if a folder holds no run.
    Raises: SystemExit after --help, or if the words are not RUN_FOLDER [OTHER ...].
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="the run; gets report.html")
    parser.add_argument(
        "others", type=Path, nargs="*", metavar="OTHER", help="runs to compare it with"
    )
    arguments = parser.parse_args(words)
    from trainer.report.page import write_page  # it imports matplotlib, which --help does not need

    with clean_output():
        try:
            print(write_page(arguments.run, arguments.others))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
