"""safetensors files by header and slice: what is in them is known, and checked, before a byte of any tensor is read.

A file is 8 bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, and the tensors end to end.
Tensors are mapped, not read: a slice of a mapped array touches only its own pages, and they are the file's, not ours.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_zoo.checkpoints.native import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "model.pth")

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
        "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
        "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One entry of a header: where the bytes are and what they mean."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def where(self) -> str:
        return f"{self.file}: tensor {self.name!r}"

    def read(self, mapped: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The tensor as a view of its file, given what maps files."""
        return mapped(self.file)[self.begin : self.begin + self.size].view(self.dtype).reshape(self.shape)


class Files:
    """Opens tensors as views of their files, each file mapped once and read-only."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self._mapped = tensors, {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def read(self, name: str, *part) -> np.ndarray:
        """The tensor, or what its kind knows as a part of it."""
        return self.tensors[name].read(self._map, *part)

    def _map(self, file: Path) -> np.ndarray:
        if file not in self._mapped:
            self._mapped[file] = np.asarray(np.memmap(file, np.uint8, "r"))
        return self._mapped[file]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a published directory, one file or shards with an index.

    Raises CheckpointError, before anything is read: no safetensors (pickle files are refused with the way out), an
    index that names files outside the folder, missing shards, headers that contradict the file or the index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return read_header(_only_file(folder))
    weight_map = _read_index(index)
    found: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            missing = sum(f == file for f in weight_map.values())
            raise CheckpointError(f"{folder / file} is missing: {INDEX} puts {missing} tensors in it")
        for name, tensor in read_header(folder / file).items():
            if name in weight_map and weight_map[name] != file:
                raise CheckpointError(f"{tensor.where} is in this file, but {INDEX} says {weight_map[name]}")
            found[name] = tensor
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / file}: tensor {name!r} is not in it, though {INDEX} says so")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises CheckpointError where the header cannot be true."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or size > min(_LONGEST_HEADER, length - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its {length} bytes cannot hold a header of {size}"
                )
            text = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has no JSON header: {str(error)[:200]}") from error
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value, 8 + size) for name, value in header.items()}
    _end_to_end(path, tensors, 8 + size, length)
    return tensors


def write(path: Path, tensors: list[tuple[str, np.dtype, tuple[int, ...]]], value: Callable[[str], np.ndarray]) -> None:
    """Writes one file, tensor after tensor: `value(name)` is asked for when its turn comes and held no longer."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            array = np.asarray(value(name), order="C")
            if array.dtype != dtype or array.shape != tuple(shape):
                raise ValueError(f"{name}: promised {dtype} {shape}, got {array.dtype} {array.shape}")
            file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
        file.flush()
        os.fsync(file.fileno())


def _entry(path: Path, name: str, value, data: int) -> Tensor:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has no dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(whole, shape)) or not (whole(begin) and whole(end)):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape} at {[begin, end]}, expected whole numbers")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != size:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {dtype} {shape} takes {size} bytes, "
            f"its offsets {[begin, end]} span {end - begin}"
        )
    return Tensor(path, name, DTYPES[dtype], tuple(shape), data + begin, size)


def _end_to_end(path: Path, tensors: dict[str, Tensor], start: int, length: int) -> None:
    at = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.size)):
        if tensor.begin != at:
            what = "overlaps the one before it" if tensor.begin < at else "leaves a gap before it"
            raise CheckpointError(f"{tensor.where} at {tensor.begin - start} {what}: offsets must be end to end")
        at += tensor.size
        if at > length:
            raise CheckpointError(f"{path} is truncated: tensor {tensor.name!r} ends at {at} of {length} bytes")
    if at != length:
        raise CheckpointError(f"{path} has {length - at} bytes after its last tensor: the header does not fit the file")


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(f"{folder} has {len(others)} safetensors files but no {INDEX} that says what is where")
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    pickles += sorted(p.name for p in folder.glob("pytorch_model-*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle file, which can run code when it is opened, and is never read here; "
            f'convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safe')\""
        )
    raise CheckpointError(f"{folder} has no weights: expected {SINGLE}, or shards with {INDEX}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} has no weight_map: {type(error).__name__}: {str(error)[:200]}") from error
    for name, file in pairs:
        # both separators: what is harmless here must be harmless where the folder is copied to
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file or ":" in file:
            raise CheckpointError(
                f"{index}: tensor {name!r} is put in {file!r}; expected the plain name of a safetensors file beside it"
            )
    if not pairs:
        raise CheckpointError(f"{index} names no tensor")
    return weight_map


def _unique(pairs: Iterator[tuple[str, object]], path: Path) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise CheckpointError(f"{path}: its header has {key!r} twice")
        found[key] = value
    return found
