"""Text files: one document each."""

import codecs
import collections
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError
from moe_zoo.data.formats.streams import open_bytes

# Bytes that are checked at a time.
_STEP = 1 << 20


def read_text(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields the one document of a UTF-8 text file, without its byte order mark.

    Raises:
      DataError: the file is empty, binary, in another encoding, or not wholly decompressible.
      OSError: the file cannot be read.
    """
    with open_bytes(path) as file:
        raw = file.read()
    _check(raw)
    # Bytes, not a str, which may take four times the memory.
    yield Document(raw.removeprefix(codecs.BOM_UTF8), domain)


def _check(raw: bytes) -> None:
    """Raises DataError unless `raw` is UTF-8 text with something in it."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("the file is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")
    if b"\0" in raw:
        raise DataError("the file is binary (it has NUL bytes): expected UTF-8 text.")
    decoder, blank = codecs.getincrementaldecoder("utf-8")(), True
    for begin in range(0, len(raw), _STEP):
        before = begin - len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw[begin : begin + _STEP], final=begin + _STEP >= len(raw))
        except UnicodeDecodeError as error:
            at = before + error.start
            raise DataError(
                f"the file is not UTF-8 (byte 0x{raw[at]:02x} at {at:,}): convert it, for example with "
                "`iconv -f LATIN1 -t UTF-8`."
            ) from error
        blank = blank and not text.replace("\ufeff", "").strip()
    if blank:
        raise DataError("the file is empty.")
