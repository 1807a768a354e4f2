"""Bytes of a file, decompressed while they are read; and what a file is when it is not what its name says."""

import contextlib
import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

from moe_zoo.data.errors import DataError, MissingPackageError

# How files of other kinds begin. This decides what the advice is, never how a file is read.
_BEGINNINGS = {
    rb"\x1f\x8b": "gzip-compressed: its name should end in .gz",
    rb"\x28\xb5\x2f\xfd": "zstd-compressed: its name should end in .zst",
    rb"PAR1\x15": "a parquet file: its name should end in .parquet",
    rb"ARROW1\0\0": "an Arrow file: its name should end in .arrow",
    rb"\xff\xff\xff\xff": "perhaps an Arrow stream: then its name should end in .arrow",
    rb"BZh[1-9]1AY&SY": "bzip2-compressed: decompress it",
    rb"\xfd7zXZ\0": "xz-compressed: decompress it",
    rb"PK\x03\x04": "a zip archive: unpack it",
    rb"version https://git-lfs\.github\.com": "a Git LFS pointer, not the data itself: run `git lfs pull`",
}
# Compressed bytes at a time. A block of zstd may grow 30,000-fold: this is at most a quarter of a gigabyte.
_CHUNK = 8192
# zstd files made with --long=31, as large archives of text are, need this window.
_MAX_WINDOW = 1 << 31


def require(package: str, path: Path) -> ModuleType:
    """Returns the optional package; raises MissingPackageError with what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        raise MissingPackageError(
            f"reading {path.name!r} needs the package {root}, which is not installed: `pip install 'moe-zoo[data]'`."
        ) from error


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns the message of another library's error as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_beginning(path: Path, *expected: bytes) -> None:
    """Raises DataError if `path` is empty, or begins with nothing `expected` but as a file of another kind does."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise DataError("the file is empty.")
    if head.startswith(expected):
        return
    for beginning, what in _BEGINNINGS.items():
        if re.match(beginning, head):
            raise DataError(f"the file is {what}.")


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Opens `path` for reading bytes, through gzip or zstd if its name ends so.

    Raises:
      DataError: the file is of another kind, damaged or cut short; also while reading.
      OSError: the file cannot be read.
    """
    name = path.name.lower()
    if name.endswith(".gz"):
        check_beginning(path, b"\x1f\x8b")
        opened, errors = gzip.open(path), (gzip.BadGzipFile, EOFError, zlib.error)
    elif name.endswith(".zst"):
        check_beginning(path, b"\x28\xb5\x2f\xfd")
        zstandard = require("zstandard", path)
        opened, errors = io.BufferedReader(_ZstdReader(path, zstandard), 1 << 17), (zstandard.ZstdError, EOFError)
    else:
        check_beginning(path)
        opened, errors = open(path, "rb"), ()
    try:
        with opened as file:
            yield file
    except errors as error:
        kind = "gzip" if name.endswith(".gz") else "zstd"
        raise DataError(f"not a whole {kind} file: {one_line(error)}") from error


class _ZstdReader(io.RawIOBase):
    """Frames of zstd one after the other. Unlike the package's own reader, it says when the last one is cut short."""

    def __init__(self, path: Path, zstandard: ModuleType):
        self._file = open(path, "rb")
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            self._output = memoryview(self._frame.decompress(self._input))
            ended = self._frame.eof
            self._input = self._frame.unused_data if ended else b""
            self._frame = None if ended else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
