"""Parquet and Arrow files: one record a row, read in batches of rows and only the columns that are needed."""

import collections
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError
from moe_zoo.data.formats.records import choose_columns, keep_good, passed_over, to_document
from moe_zoo.data.formats.streams import check_beginning, one_line, require

if TYPE_CHECKING:
    import pyarrow

_log = logging.getLogger(__name__)

# Rows that are turned into Python objects at a time.
_ROWS = 256
_STREAM_BEGINNING, _STREAM_END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields one document per good row, row group by row group; bad rows are counted (see `records` for the columns).

    Raises:
      DataError: pyarrow is not installed, not a parquet file, damaged, no usable column, or no good row.
      OSError: the file cannot be opened.
    """
    yield from keep_good(_results(_parquet_batches(path), domain, path), "row", path, skipped)


def read_arrow(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields one document per good row of an Arrow stream (what `datasets` writes) or an Arrow file (Feather 2).

    Raises:
      DataError: as `read_parquet`.
      OSError: the file cannot be opened.
    """
    yield from keep_good(_results(_arrow_batches(path), domain, path), "row", path, skipped)


def _parquet_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """Yields batches whose columns carry the names of a record's fields."""
    pa, pq = require("pyarrow", path), require("pyarrow.parquet", path)
    check_beginning(path, b"PAR1")
    with _arrow_errors(pa, "parquet"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        fields = _fields(pa, file.schema_arrow, path)
        for group in range(file.num_row_groups):
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(fields), use_threads=False)
            for batch in batches:
                yield batch.rename_columns([fields[name] for name in batch.schema.names])


def _arrow_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """Yields batches whose columns carry the names of a record's fields."""
    pa = require("pyarrow", path)
    check_beginning(path, b"ARROW1", _STREAM_BEGINNING)
    # Not a memory map: a file that shrinks meanwhile would end the process.
    with _arrow_errors(pa, "Arrow"), pa.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        whole = is_file or _ends_with(path, _STREAM_END)
        make = pa.ipc.open_file if is_file else pa.ipc.open_stream
        file.seek(0)
        schema = make(file).schema
        fields = _fields(pa, schema, path)
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in fields])
        file.seek(0)
        reader = make(file, options=options)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            # Unlike parquet's, the buffers come from the file as they are: an offset may point anywhere.
            batch.validate(full=True)
            batch = batch.rename_columns([fields[name] for name in batch.schema.names])
            yield from (batch.slice(begin, _ROWS) for begin in range(0, batch.num_rows, _ROWS))
    if not whole:
        _log.warning("%s: the stream has no end marker; perhaps rows are missing", path)


def _ends_with(path: Path, ending: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(ending)))
        return file.read() == ending


@contextlib.contextmanager
def _arrow_errors(pa, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file, which is of many types, into DataError."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise DataError(f"not a whole {kind} file: {one_line(error)}") from error


def _fields(pa, schema: "pyarrow.Schema", path: Path) -> dict[str, str]:
    """Returns {column: field of a record} for the columns to read."""
    strings = [field.name for field in schema if _is_text(pa, field.type)]
    if "text" not in strings:
        # Some writers do not mark text as such; a lone column of bytes that nobody calls text is no text.
        strings += [field.name for field in schema if field.name == "text" and _is_bytes(pa, field.type)]
    fields = choose_columns(schema.names, strings)
    if repeated := [name for name in fields if schema.names.count(name) > 1]:
        raise DataError(f"the column {repeated[0]!r} is there {schema.names.count(repeated[0])} times: expected once.")
    if names := passed_over(schema.names):
        _log.warning("%s: read as plain text; remove the column 'text' to train on %s", path, names)
    if renamed := [name for name, field in fields.items() if name != field]:
        _log.warning("%s: no column 'text'; reading %r, the only column of strings", path, renamed[0])
    return fields


def _is_text(pa, kind: "pyarrow.DataType") -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(pa, kind: "pyarrow.DataType") -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _results(batches: Iterator["pyarrow.RecordBatch"], domain: str, path: Path) -> Iterator[Document | str]:
    for batch in batches:
        for record in _records(batch):
            yield record if isinstance(record, str) else to_document(record, domain)


def _records(batch: "pyarrow.RecordBatch") -> list[dict[str, Any] | str]:
    """Returns the rows as dicts; "bad UTF-8" for those that are not."""
    try:
        return [_decoded(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return ["bad UTF-8"]
    return [record for i in range(batch.num_rows) for record in _records(batch.slice(i, 1))]


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row.get("text"), bytes):
        row["text"] = row["text"].decode("utf-8")
    return row
