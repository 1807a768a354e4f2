"""Folders that `datasets.save_to_disk` wrote, read without the `datasets` package."""

import collections
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError
from moe_zoo.data.formats.tables import read_arrow

_log = logging.getLogger(__name__)

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether `folder` is a saved data set (one split) or a dict of them."""
    return (folder / _DICT).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def read_saved(folder: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields the documents of a saved data set; of a dict, those of every split that is there, one after the other.

    The splits are documents of one domain: `moe_zoo.data.split` splits anew, and never parts equal texts.

    Raises:
      DataError: a description or a data file is missing or damaged, or see `read_arrow`.
      OSError: a file cannot be read.
    """
    if not (folder / _DICT).is_file():
        yield from _read_split(folder, domain, skipped)
        return
    names = _strings(_read_json(folder / _DICT).get("splits"), folder / _DICT)
    there = [name for name in names if is_saved(folder / name)]
    if not there:
        raise DataError(f"{_DICT} names the splits {', '.join(names) or 'none'}: none of them is there.")
    if missing := sorted(set(names) - set(there)):
        skipped["split(s) that are not there"] += len(missing)
        _log.warning("%s: the split(s) %s are not there", folder, ", ".join(missing))
    _log.warning("%s: the splits %s are read as one and split anew", folder, ", ".join(there))
    for name in there:
        yield from _read_split(folder / name, domain, skipped)


def _read_split(folder: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    state = _read_json(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder.name}/{_STATE} selects rows by an index, as old versions of `datasets` saved them: "
            "save it again after `flatten_indices()`."
        )
    entries = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    # A name, not a path: nothing outside the folder is read.
    names = [Path(name).name for name in _strings(names, folder / _STATE)]
    listed = {*names, _STATE, _INFO}
    if others := [path.name for path in folder.iterdir() if path.name not in listed and not path.name.startswith(".")]:
        skipped["file(s) that a saved data set does not list"] += len(others)
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder.name}/{_STATE} names {name!r}, which is not there.")
        try:
            yield from read_arrow(folder / name, domain, skipped)
        except DataError as error:
            raise type(error)(f"{folder.name}/{name}: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.parent.name}/{path.name} is not valid JSON.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path.parent.name}/{path.name} is not a JSON object.")
    return value


def _strings(values: object, path: Path) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
        raise DataError(f"{path.parent.name}/{path.name} does not list its files or splits, as `save_to_disk` does.")
    if any("\0" in value for value in values):
        raise DataError(f"{path.parent.name}/{path.name} has a name with a NUL byte.")
    return values
