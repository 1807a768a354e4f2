"""The file formats that a corpus is read from: one reader per format, in one table.

A reader is `read(path, domain, skipped) -> Iterator[Document]`: `domain` is for records that do not say theirs, and
`skipped` counts, by reason, what was passed over. It raises DataError for a file that cannot be used, and never holds
more of a file than one document, one batch of rows or one row group.
"""

import collections
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_zoo.core.registry import nearest
from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError
from moe_zoo.data.formats.json_lines import read_json_lines
from moe_zoo.data.formats.tables import read_arrow, read_parquet
from moe_zoo.data.formats.text import read_text

Skipped = collections.Counter[str]
Reader = Callable[[Path, str, Skipped], Iterator[Document]]

READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".txt.gz": read_text,
    ".txt.zst": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
ACCEPTED_TEXT = "a .txt or .jsonl file (also .gz or .zst), a .parquet or .arrow file, or a folder of those"

# One file of a larger one, as Hugging Face and Spark name them: all of them are one domain.
_SHARD = re.compile(r"[-_.]\d+-of-\d+$")


def format_of(path: Path) -> str | None:
    """Returns the key of `READERS` that `path` ends with, in any case of letters; None if there is none."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def stem(path: Path) -> str:
    """Returns the name of `path` without its format and without a shard's "-00001-of-00005"."""
    suffix = format_of(path)
    name = path.name[: -len(suffix)] if suffix and len(path.name) > len(suffix) else path.stem
    return _SHARD.sub("", name) or name


def read_file(path: Path, domain: str, skipped: Skipped) -> Iterator[Document]:
    """Returns an iterator over the documents of one file.

    Raises:
      DataError: a format that is not accepted, at once; content that is not of that format, while iterating.
      OSError: the file cannot be read, while iterating.
    """
    suffix = format_of(path)
    if suffix is None:
        given = "".join(path.suffixes[-2:]) if path.suffix else ""
        hint = nearest(given, READERS) if given else ""
        shown = repr(given) if given else "without a suffix"
        raise DataError(f"unsupported format {shown}: expected {ACCEPTED_TEXT}{hint}.")
    return READERS[suffix](path, domain, skipped)
