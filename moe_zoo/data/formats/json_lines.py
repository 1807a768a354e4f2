"""JSON lines: one record a line."""

import collections
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe_zoo.data.corpus import Document
from moe_zoo.data.formats.records import keep_good, passed_over, to_document
from moe_zoo.data.formats.streams import open_bytes

_log = logging.getLogger(__name__)

# A longer line is no record but a file without line ends; reading it whole could take all memory.
_MAX_LINE = 1 << 28


def read_json_lines(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields one document per good line; bad lines are counted (see `records` for the fields).

    Raises:
      DataError: no line is good, or the file is not wholly decompressible.
      OSError: the file cannot be read.
    """
    yield from keep_good(_results(path, domain), "line", path, skipped)


def _results(path: Path, domain: str) -> Iterator[Document | str | None]:
    told = False
    with open_bytes(path) as file:
        while line := file.readline(_MAX_LINE):
            if not line.strip():
                yield None
                continue
            record = _parse(line, file)
            if isinstance(record, str):
                yield record
                continue
            if not told and (names := passed_over(record)):
                _log.warning("%s: read as plain text; remove 'text' to train on %s", path, names)
                told = True
            yield to_document(record, domain)


def _parse(line: bytes, file: IO[bytes]) -> dict | str:
    """Returns the object on a line, or what is wrong with it."""
    if len(line) == _MAX_LINE:
        while line and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE)
        return f"more than {_MAX_LINE:,} bytes"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "bad UTF-8"
    except (ValueError, RecursionError):
        return "invalid JSON"
    return value if isinstance(value, dict) else "JSON that is not an object"
