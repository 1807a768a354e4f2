"""The grouped matmul as Pallas GPU kernels: what they can take, and the calls.

Dims as in api.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _gpu_rows, _gpu_target, _gpu_tiles, _gpu_weights
from pallas_kernels.quantized import Quantized, Weights

#: Sizes are held in registers by every program.
MAX_GROUPS = 2047
_PHASES = ((_gpu_rows.Product(0, 0, 0),),)


def why_not(*operands: Array | Weights, num_groups: int, asked: str | None, out_dtype: Any = None) -> str | None:
    """Why the kernels, of the forward pass and of both gradients, can't take these operands; None if they can."""
    dtypes = (jnp.bfloat16, jnp.float32)
    wide = [a.dtype for a in operands if not isinstance(a, Quantized)]
    wide += [] if out_dtype is None else [jnp.dtype(out_dtype)]
    if any(dtype not in dtypes for dtype in wide):
        return f"the kernel takes bfloat16 and float32, not {' to '.join(dict.fromkeys(map(str, wide)))}"
    if any(0 in a.shape for a in operands):
        return "there is nothing to compute"
    if num_groups > MAX_GROUPS:
        return f"the kernel takes at most {MAX_GROUPS} groups"
    target = _gpu_target.current()
    if target is None:
        return "this is not traced for an NVIDIA GPU" if asked is None else None
    if target.capability < 80:
        return f"the kernel needs compute capability 8.0, the device has {target.capability / 10:.1f}"
    if target.capability < 89 and any(isinstance(a, Quantized) and "e4m3" in a.dtype.name for a in operands):
        return f"float8_e4m3fn needs compute capability 8.9, the device has {target.capability / 10:.1f}"
    return None


def matmul(
    lhs_MK: Array,
    rhs: Weights,
    sizes_L: Array,
    offset: Array | None,
    *,
    transpose_rhs: bool,
    out_dtype: Any,
    tiles: _gpu_tiles.Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """out (M, N): each row times its group's matrix."""
    (M, K), G = lhs_MK.shape, rhs.shape[0]
    N = rhs.shape[1 if transpose_rhs else 2]
    tiles = tiles or _gpu_tiles.row_tiles(
        M, K, N, G, lhs_MK.dtype.itemsize, _gpu_target.current() or _gpu_target.SMALLEST
    )
    call = _gpu_rows.Call(
        M, K, N, G, sizes_L.shape[0], _PHASES, transpose_rhs, tiles, (jnp.dtype(out_dtype),), _gpu_rows.store
    )
    return _matmul(lhs_MK, rhs, sizes_L, offset, call=call, interpret=interpret)


def weight_gradient(
    left_MA: Array,
    right_MB: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    num_groups: int,
    tiles: _gpu_tiles.Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """left.T @ right over each group's rows: (G, A, B)."""
    (M, A), B = left_MA.shape, right_MB.shape[1]
    target = _gpu_target.current() or _gpu_target.SMALLEST
    tiles = tiles or _gpu_tiles.weight_tiles(M, A, B, num_groups, left_MA.dtype.itemsize, target)
    how = dict(num_groups=num_groups, tiles=tiles, interpret=interpret)
    return _weight_gradient(left_MA, right_MB, sizes_L, offset, **how)


# Compiled functions only so that calls of the same shapes are traced once.
@functools.partial(jax.jit, static_argnames=("call", "interpret"))
def _matmul(lhs_MK, rhs, sizes_L, offset, *, call, interpret):
    return _gpu_rows.matmul_rows(call, [lhs_MK], [rhs], sizes_L, offset, interpret=interpret)[0]


_weight_gradient = jax.jit(_gpu_weights.weight_gradient, static_argnames=("num_groups", "tiles", "interpret"))
