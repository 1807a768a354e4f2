"""How one leaf of ours lies in published tensors: the name, and the few ways in which it is turned.

Every turn is a view in numpy, in both directions. So a slice of our leaf is a slice of the mapped file, and importing
and exporting are the same description read forwards and backwards.
"""

import dataclasses
import math
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a leaf lives. `name`: the tensor's, below the layer's prefix; with "{e}" there is one tensor per expert.

    `form`: "same"; "flat", one row of all its numbers; "row", the same as [1, size], "column", as [1, 1, size, 1];
    "conv", [C, K] as [C, 1, K]; "linear", a weight stored [out, in] whose first `inputs` dims are the inputs in ours,
    behind an axis of experts with `batched`; with `stacked` that axis and the next are one. `part` i of `parts`: the
    tensor holds several of our leaves along its output axis, one after the other, of `sizes` (none given: alike), or,
    `interleaved`, taking turns, or, `by_head`, one after the other in each head.
    """

    name: str
    form: Literal["same", "flat", "row", "column", "conv", "linear"] = "same"
    inputs: int = 1
    batched: bool = False
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    stacked: bool = False
    sizes: tuple[int, ...] = ()
    by_head: bool = False

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.name

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the published tensor, for our leaf (of one expert, where there is one tensor each)."""
        if self.form == "same" and not ours:
            return ()
        width = sum(self.sizes) if self.sizes else self.parts * self.width(ours)
        if self.form == "same":
            shape = (*ours[:-1], width)
        elif self.form == "conv":
            shape = (ours[0], 1, ours[1])
        elif self.form == "linear":
            lead, rest = (ours[:1], ours[1:]) if self.batched else ((), ours)
            shape = (*lead, width, math.prod(rest[: self.inputs]))
        else:
            shape = {"row": (1, width), "column": (1, 1, width, 1)}.get(self.form, (width,))
        return (shape[0] * shape[1], *shape[2:]) if self.stacked else shape

    def width(self, ours: tuple[int, ...]) -> int:
        """How much of the tensor's output axis our leaf takes."""
        if self.form == "same":
            return math.prod(ours[-1:])
        return math.prod(ours[self.batched + self.inputs :] if self.form == "linear" else ours)

    def ours(self, published: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Our leaf as a view of the published tensor."""
        return self._view(published, ours).reshape(ours, copy=False)

    def put(self, published: np.ndarray, leaf: np.ndarray) -> None:
        """Writes our leaf into its place in the published tensor."""
        target = self._view(published, leaf.shape)
        copy_into(target, leaf.reshape(target.shape))

    def _view(self, published: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """What the tensor holds of a leaf of this shape, inputs before outputs."""
        if published.ndim == 0:
            return published
        if self.by_head:
            heads, size = ours[-2:]
            return np.moveaxis(published.reshape(heads, self.parts, size, -1, copy=False)[:, self.part], -1, 0)
        if self.stacked:  # an axis of experts of its own
            published = published.reshape((ours[0], -1, *published.shape[1:]), copy=False)
        view = published[self._slice(published)]
        return np.swapaxes(view, -1, -2) if self.form == "linear" else view

    def _slice(self, published: np.ndarray) -> tuple:
        axis = published.ndim - (2 if self.form == "linear" else 1)
        sizes = self.sizes or (published.shape[axis] // self.parts,) * self.parts
        start = sum(sizes[: self.part])
        one = slice(self.part, None, self.parts) if self.interleaved else slice(start, start + sizes[self.part])
        return (slice(None),) * axis + (one,)


def linear(name: str, inputs: int = 1, **more) -> Stored:
    """A linear weight, stored [out, in]."""
    return Stored(name, "linear", inputs, **more)


#: bytes of one tile of a transposed copy, and its width: what the second-level cache holds beside what it becomes
_TILE_BYTES, _TILE_COLUMNS = 1 << 18, 256


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; where one is the other transposed, tile by tile: twice as fast and more."""
    if target.dtype == source.dtype and source.dtype.kind == "V":
        # numpy copies its own types without the interpreter lock, and faster
        target, source = (a.view(f"u{a.itemsize}") for a in (target, source))
    if not (_transposed(source) or _transposed(target)):
        target[...] = source
    elif source.ndim == 2:
        _copy_transposed(target, source)
    else:
        for shape in ((source.shape[0], -1), (-1, source.shape[-1])):
            try:
                flat = target.reshape(shape, copy=False), source.reshape(shape, copy=False)
            except ValueError:
                continue
            return copy_into(*flat)
        for part, of in zip(target, source):
            copy_into(part, of)


def _transposed(array: np.ndarray) -> bool:
    return array.ndim > 1 and array.strides[-1] > min(array.strides[:-1])


def _copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """Through a tile whose rows are some bytes too long: rows a power of two apart would share the lines of a cache."""
    if _transposed(target):
        target, source = target.T, source.T
    columns = _TILE_COLUMNS  # of the source as it lies in memory, rows of the target
    rows = _TILE_BYTES // (columns * source.itemsize)
    tile = np.empty((rows, columns + 64 // source.itemsize), source.dtype)
    for c in range(0, source.shape[0], columns):
        for r in range(0, source.shape[1], rows):
            part = source[c : c + columns, r : r + rows].T
            inside = tile[: part.shape[0], : part.shape[1]]
            inside[...] = part
            target[c : c + columns, r : r + rows] = inside.T
