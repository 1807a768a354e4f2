"""The store: one JSON line per run, appended and never changed.

A writer holds the file's lock while it appends, so several processes may share a store; a line that a kill tore in half
is cut off by the next writer and passed over by readers until then.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_zoo.data.errors import DataError


class Store:
    """Runs by key. `read` and `append` look at the file every time: another process may have written."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """All runs, in the order in which they were written. Raises DataError for a whole line that is not a run."""
        try:
            whole, _ = _whole(self.path.read_bytes())
        except FileNotFoundError:
            return []
        return [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]

    def keys(self) -> set[str]:
        """The keys of all runs."""
        return {run["key"] for run in self.read()}

    def append(self, run: Mapping[str, Any]) -> bool:
        """Adds a run; False, and nothing is written, if one of this key is there. On disk when it returns."""
        line = json.dumps(run, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, also by a kill
            file.seek(0)
            whole, torn = _whole(file.read())
            if torn:
                file.truncate(len(whole))
            if any(self._parse(number, old)["key"] == run["key"] for number, old in enumerate(whole.splitlines(), 1)):
                return False
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            run = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.path}, line {number}: not JSON ({error}); mend it or take it out") from error
        if not isinstance(run, dict) or "key" not in run:
            raise DataError(f"{self.path}, line {number}: no run of a comparison: it has no key")
        return run


def _whole(content: bytes) -> tuple[bytes, bytes]:
    """(whole lines, what a kill left of a last one)."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]
