"""Standard output and standard error that do not end a run."""

import sys
from typing import Any, TextIO


class SteadyStream:
    """A text stream that drops what it cannot write: a log can lie on a disk that is full.

    Other attributes are those of the wrapped stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; return its length, also if it is dropped."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Hand the text on to the file or pipe."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_output() -> None:
    """Let no print of this process fail: its numbers are in the run folder, too."""
    sys.stdout, sys.stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
