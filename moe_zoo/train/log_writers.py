"""Where metrics go: a JSON-lines file that survives kills and resumes, and TensorBoard.

Every writer has the same three methods: `write(step, kind, metrics)`, `truncate_after(step)` (called once on resume, so
that the steps which are about to be trained again do not appear twice), and `close()`. `Writers` fans out to several.

A line of the file is `{"step": 120, "kind": "train", "loss": 1.52, "expert_load": [[0.2, 0.8], ...], ...}`. JSON has
no word for NaN and infinity, and Python's `json` would write ones that no other reader accepts: they are written as
`null`, which `read_metrics` gives back as NaN.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
    """What `Writers` fans out to."""

    def write(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends one line per `write` to a file, flushed at once: a killed run loses at most the line being written.

    For a resumed run to leave the same file as an uninterrupted one, write all lines of a step before its checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line torn by a kill would otherwise swallow the first line of this run.
        _rewrite(self._path, _whole_lines)
        self._file = self._path.open("ab")

    def write(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Appends a line.

        Args:
            step: optimizer steps done when the metrics were taken.
            kind: "train", "validation", ...
            metrics: name to number or nested lists of numbers; numpy and host-side JAX arrays are accepted.
        """
        if reserved := {"step", "kind"} & set(metrics):
            raise ValueError(f"metrics may not be named {sorted(reserved)}: these are fields of every line")
        line = {"step": int(step), "kind": kind} | {name: _to_json(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps than `step`; lines that are not JSON or have no step are kept as they are."""
        self._file.close()
        _rewrite(self._path, lambda lines: [line for line in _whole_lines(lines) if not _is_later(line, step)])
        self._file = self._path.open("ab")

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writes the scalars among the metrics as `kind/name`; lists are left to the JSON-lines file.

    `tensorboardX` is imported, and the event file made, at the first scalar.

    Args:
        directory: the log directory.
        resume_step: the step that was restored, if any: TensorBoard is told to forget what came after it.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None):
        self._directory = pathlib.Path(directory)
        self._resume_step = resume_step
        self._summary_writer = None

    def write(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if _is_scalar(value):
                self._open().add_scalar(f"{kind}/{name}", float(value), int(step))

    def truncate_after(self, step: int) -> None:
        self.close()
        self._resume_step = step

    def close(self) -> None:
        if self._summary_writer is not None:
            self._summary_writer.close()
            self._summary_writer = None

    def _open(self):
        if self._summary_writer is None:
            import tensorboardX  # imported here: it costs a second that `--help` should not pay

            # Purging starts *at* the given step, and the restored step's own scalars stay.
            purge_step = None if self._resume_step is None else self._resume_step + 1
            self._summary_writer = tensorboardX.SummaryWriter(
                str(self._directory), purge_step=purge_step, flush_secs=20
            )
        return self._summary_writer


class Writers:
    """Fans out to several writers, and closes them all at the end of a `with` block."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(step, kind, metrics)

    def truncate_after(self, step: int) -> None:
        for writer in self._writers:
            writer.truncate_after(step)

    def close(self) -> None:
        """Closes every writer, also when one fails, and then raises the first failure."""
        failures = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as failure:  # pylint: disable=broad-exception-caught
                failures.append(failure)
        if failures:
            raise failures[0]

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a file of `JsonlWriter`: `null` as NaN, and without lines that are not JSON objects (a torn one)."""
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    return [_null_to_nan(parsed) for line in lines if (parsed := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:  # both of bad JSON and of bad UTF-8
        return None
    return parsed if isinstance(parsed, dict) else None


def _null_to_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_to_nan(item) for item in value]
    if isinstance(value, dict):
        return {name: _null_to_nan(item) for name, item in value.items()}
    return math.nan if value is None else value


def _is_later(line: bytes, step: int) -> bool:
    line_step = (_parse(line) or {}).get("step")
    return isinstance(line_step, (int, float)) and line_step > step


def _whole_lines(lines: list[bytes]) -> list[bytes]:
    """The lines, each with its newline; a torn last one is dropped, unless only its newline is missing."""
    if not lines or lines[-1].endswith(b"\n"):
        return lines
    return lines[:-1] + ([lines[-1] + b"\n"] if _parse(lines[-1]) is not None else [])


def _rewrite(path: pathlib.Path, change) -> None:
    """Replaces a file's lines by `change(lines)`, in one step that a kill cannot cut in half."""
    if not path.exists():
        return
    before = path.read_bytes()
    after = b"".join(change(re.findall(rb"[^\n]*\n|[^\n]+", before)))
    if after == before:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    return isinstance(value, (int, float)) or (getattr(value, "shape", None) == () and hasattr(value, "dtype"))


def _to_json(value: Any) -> Any:
    """Plain Python numbers and lists; non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        return _to_json(list(array)) if array.ndim else _number(array[()])
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _number(value: np.generic) -> Any:
    if np.issubdtype(value.dtype, np.integer) or value.dtype == bool:
        return value.item()
    if not math.isfinite(value):
        return None
    # By way of the shortest decimal that names this float: 2.3 rather than the 2.299999952316284 of a widened float32.
    return float(value) if value.dtype == np.float64 else float(str(value))
