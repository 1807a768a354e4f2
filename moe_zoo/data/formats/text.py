"""Text files: one document each."""

import collections
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError
from moe_zoo.data.formats.streams import open_bytes


def read_text(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields the one document of a UTF-8 text file, without its byte order mark.

    Raises:
      DataError: the file is empty, binary, in another encoding, or not wholly decompressible.
      OSError: the file cannot be read.
    """
    with open_bytes(path) as file:
        raw = file.read()
    yield Document(_decode(raw), domain)


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")
    if b"\0" in raw:
        raise DataError("the file is binary (it has NUL bytes): expected UTF-8 text.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start:,}): convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from error
    if not text.strip():
        raise DataError("the file is empty.")
    return text
