"""Read the rows of the Arrow files that `save_to_disk` of Hugging Face `datasets` writes."""

from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import pyarrow
from pyarrow import ipc

from data.storage.parquet import (
    BATCH_ROWS,
    IMAGE_ROWS,
    MAX_CELL_BYTES,
    Columns,
    kind_of,
    one_line,
    rows_of,
)

_arrow: Any = pyarrow
"""The module without its types, which pyarrow does not declare."""
_ipc: Any = ipc


class ArrowTable:
    """An open Arrow file: a stream of record batches, or the file format with a footer.

    Raises: ValueError with one line where it is neither.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        with one_line():
            schema = self._batches().schema
            self.columns: Columns = {one.name: kind_of(one.type) for one in schema}
            self.metadata: dict[bytes, bytes] = schema.metadata or {}
            self.rows = sum(batch.num_rows for batch in self._sound())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(
        self, columns: list[str], *, images: str = "", max_cell_bytes: int = MAX_CELL_BYTES
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows: {name of a column: value}.

        images: a column of images, whose cells are large. max_cell_bytes: largest text or image.
        Raises: ValueError with one line where the file is damaged, or a cell over the limit.
        """
        with one_line():
            chosen = (batch.select(columns) for batch in self._sound())
            rows = IMAGE_ROWS if images else BATCH_ROWS
            parts = (
                batch.slice(start, rows)
                for batch in chosen
                for start in range(0, batch.num_rows, rows)
            )
            yield from rows_of(parts, max_cell_bytes)

    def _sound(self) -> Iterator[Any]:
        """Yield the record batches; pyarrow itself does not check where their values lie."""
        for batch in self._batches():
            batch.validate(full=True)
            yield batch

    def _batches(self) -> Any:
        self._source.seek(0)
        try:
            return _ipc.open_stream(self._source)
        except _arrow.ArrowInvalid:
            self._source.seek(0)
            reader = _ipc.open_file(self._source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            return _arrow.RecordBatchReader.from_batches(reader.schema, batches)
