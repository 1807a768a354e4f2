"""Expert weights in int8 with a float32 scale per output channel, made while reading: nothing is ever held wide but a
few rows per thread.

As `pallas_kernels.quantize`: scale = largest magnitude of the channel / 127, value = weight / scale, rounded.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from moe_zoo.checkpoints.hf import memory
from moe_zoo.checkpoints.hf.layout import copy_into
from moe_zoo.checkpoints.hf.plan import Leaf
from moe_zoo.checkpoints.hf.safetensors import Files

_CHANNELS = 128  # that a thread holds wide at a time
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def place(leaf: Leaf, files: Files, shardings, pool: ThreadPoolExecutor) -> tuple[jax.Array, jax.Array]:
    """(values int8 [..., A, B], scale f32 [..., 1, B]) of a leaf [..., A, B] whose matmuls sum over A.

    Each lies where its sharding says; what several devices hold is read once.
    """
    scale = memory.empty((*leaf.shape[:-2], 1, leaf.shape[-1]), np.dtype(np.float32))
    shards: dict[tuple, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
        if bounds not in shards:
            shards[bounds] = _read(leaf, files, bounds, scale, pool)
        return shards[bounds]

    values = jax.make_array_from_callback(leaf.shape, shardings[0], shard)
    # copied, so that no device keeps all scales alive
    return values, jax.make_array_from_callback(scale.shape, shardings[1], lambda index: np.array(scale[index]))


def _read(leaf: Leaf, files: Files, bounds, scale: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """The values within `bounds`; their channels' scales, which take all of A, are written where they belong."""
    A, B = leaf.shape[-2:]
    out = memory.empty([stop - start for start, stop in bounds], np.dtype(np.int8))

    def fill(where: tuple[int, ...], name: str, experts: tuple[int, ...]) -> None:
        """`experts`: () or, where one tensor holds several, the number of one within the bounds."""
        at = tuple(start + e for e, (start, _) in zip(experts, bounds[len(where) :]))
        wide = leaf.view(files, name, (*(slice(e, e + 1) for e in at), slice(0, A), slice(0, B)))
        target = out[(*(i - start for i, (start, _) in zip(where, bounds)), *experts)]
        memory.touch(target)
        _quantize(wide.reshape(A, B, copy=False), target, scale[(*where, *at)][0], *bounds[-2:])

    mine = [t for t in leaf.tensors() if all(start <= i < stop for i, (start, stop) in zip(t[0], bounds))]
    for done in [pool.submit(fill, *t, e) for t in mine for e in np.ndindex(out.shape[len(t[0]) : -2])]:
        done.result()
    return out


def _quantize(wide: np.ndarray, target: np.ndarray, scale: np.ndarray, rows, channels) -> None:
    """`wide` [A, B] -> `target` int8, its part [rows, channels], and `scale` [B] of those channels."""
    for at in range(channels[0], channels[1], _CHANNELS):
        stop = min(at + _CHANNELS, channels[1])
        w = _float32(wide[:, at:stop].T)  # a channel per row, as it lies in most files
        largest = np.maximum(w.max(axis=1), -w.min(axis=1))
        scale[at:stop] = np.where(largest > 0, largest / np.float32(127), 1)
        w = w[:, slice(*rows)]
        np.divide(w, scale[at:stop, None], out=w)
        narrow = np.rint(w, out=w).astype(np.int8)
        copy_into(target[:, at - channels[0] : stop - channels[0]], narrow.T)


def _float32(array: np.ndarray) -> np.ndarray:
    """A copy in float32; bfloat16 by its bits, which numpy does many at a time and without the interpreter lock."""
    if array.dtype != _BFLOAT16:
        return np.array(array, np.float32, order="C")
    bits = np.array(array.view(np.uint16), np.uint32, order="C")
    return np.left_shift(bits, 16, out=bits).view(np.float32)
