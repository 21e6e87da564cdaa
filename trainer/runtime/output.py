"""Standard output and error that show no secret, and obey no text from outside."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from data.secrets import redact
from data.text import escaped

CURSOR_UP = "\x1b[A"
"""tqdm moves between its bars with this, alone or repeated."""
KEPT = "\n\r\t"


class CleanOutput:
    """A text stream that redacts and escapes all that is written, and passes it on.

    Text from outside can hold escape sequences, which control a terminal, and characters that the
    terminal's encoding lacks, which would end the program.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        if text.replace(CURSOR_UP, "").strip(KEPT):
            text = escaped(redact(text), KEPT)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def clean_output() -> Generator[None, None, None]:
    """Let standard output and error redact and escape within the block."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", CleanOutput(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
