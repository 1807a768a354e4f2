"""The grouped matmul as Pallas TPU kernels: what the kernels take, and the calls.

Dims as in api.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_schedule, _tpu_target
from pallas_kernels.grouped_matmul import pallas_tpu_drhs, pallas_tpu_forward, pallas_tpu_tiles


def matmul(
    lhs_MK: Array,
    rhs: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    transpose_rhs: bool,
    out_dtype: Any,
    tiles: pallas_tpu_tiles.ForwardTiles | None = None,
    interpret: bool = False,
) -> Array:
    """out (M, N): each row times its group's matrix."""
    (M, K), G = lhs_MK.shape, rhs.shape[0]
    N = rhs.shape[1 if transpose_rhs else 2]
    target = _tpu_target.current()
    fragment = _tpu_schedule.fragment_rows(lhs_MK.dtype, out_dtype)
    padded = -M % 8
    if tiles is None:
        tiles = pallas_tpu_tiles.forward_tiles(M + padded, K, N, G, lhs_MK.dtype, out_dtype, target)
    static = pallas_tpu_forward.Static(
        M + padded, K, N, G, transpose_rhs, fragment, target.num_cores, tiles
    )
    out = pallas_tpu_forward.matmul(
        jnp.pad(lhs_MK, ((0, padded), (0, 0))) if padded else lhs_MK,
        rhs,
        sizes_L.astype(jnp.int32),
        jnp.zeros(1, jnp.int32) if offset is None else offset.astype(jnp.int32).reshape(1),
        static=static,
        out_dtype=out_dtype,
        interpret=pltpu.InterpretParams() if interpret else False,
    )
    return out[:M] if padded else out


def weight_gradient(
    left_MA: Array,
    right_MB: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    num_groups: int,
    tiles: pallas_tpu_tiles.DrhsTiles | None = None,
    interpret: bool = False,
) -> Array:
    """left.T @ right over each group's rows: (G, A, B)."""
    (M, A), B = left_MA.shape, right_MB.shape[1]
    target = _tpu_target.current()
    fragment = _tpu_schedule.fragment_rows(left_MA.dtype)
    if tiles is None:
        tiles = pallas_tpu_tiles.drhs_tiles(M, A, B, num_groups, left_MA.dtype, target)
    static = pallas_tpu_drhs.Static(M + -M % 8, A, B, num_groups, fragment, target.num_cores, tiles)
    pad = lambda x: jnp.pad(x, ((0, -M % 8), (0, 0))) if M % 8 else x
    return pallas_tpu_drhs.weight_gradient(
        pad(left_MA),
        pad(right_MB),
        sizes_L.astype(jnp.int32),
        jnp.zeros(1, jnp.int32) if offset is None else offset.astype(jnp.int32).reshape(1),
        static=static,
        interpret=pltpu.InterpretParams() if interpret else False,
    )
