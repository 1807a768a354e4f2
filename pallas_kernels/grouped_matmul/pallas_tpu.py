"""The grouped matmul as Pallas TPU kernels: what they can take, and the calls.

Dims as in api.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_schedule, _tpu_target, _varying, quantized
from pallas_kernels.grouped_matmul import pallas_tpu_drhs, pallas_tpu_forward, pallas_tpu_tiles
from pallas_kernels.quantized import Weights

#: Copies address whole HBM tiles of rows. Other numbers of rows are padded (by a copy of the operand).
_ROWS = 8
_LANES = 128
#: Sizes, table and offset lie in scalar memory, of which the smallest generation has 1 MiB.
_MAX_GROUPS = 16384


def why_not(lhs_MK: Array, rhs: Weights, *, transpose_rhs: bool, out_dtype: Any, asked: str | None) -> str | None:
    """Why the kernels, of the forward pass and of both gradients, can't take these operands; None if they can.

    Widths that are no multiple of 128 run if asked for by name: XLA may then be the faster choice.
    """
    (M, K), G = lhs_MK.shape, rhs.shape[0]
    N = rhs.shape[1 if transpose_rhs else 2]
    dtypes = (jnp.bfloat16, jnp.float32)
    if lhs_MK.dtype not in dtypes or out_dtype not in dtypes:
        return f"the kernel takes bfloat16 and float32, not {lhs_MK.dtype} to {jnp.dtype(out_dtype)}"
    if 0 in (M, K, N):
        return "there is nothing to compute"
    if G > _MAX_GROUPS:
        return f"the kernel takes at most {_MAX_GROUPS} groups"
    if asked is None and (K % _LANES or N % _LANES):
        return f"K {K} and N {N} should be multiples of {_LANES}"
    target = _tpu_target.current()
    M = _round_up(M)
    if (
        pallas_tpu_tiles.forward_tiles(M, K, N, G, lhs_MK.dtype, rhs.dtype, out_dtype, target) is None
        or pallas_tpu_tiles.forward_tiles(M, N, K, G, lhs_MK.dtype, rhs.dtype, lhs_MK.dtype, target) is None
        or pallas_tpu_tiles.drhs_tiles(M, K, N, G, lhs_MK.dtype, target) is None
    ):
        return (
            f"no tiles of K {K} and N {N} fit into the {target.vmem_bytes >> 20} MiB of vector memory of {target.name}"
        )
    return None


def matmul(
    lhs_MK: Array,
    rhs: Weights,
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
    if tiles is None:
        tiles = pallas_tpu_tiles.forward_tiles(_round_up(M), K, N, G, lhs_MK.dtype, rhs.dtype, out_dtype, target)
    inner_GK, outer_GN = quantized.scales(rhs, 2 if transpose_rhs else 1)
    which = "outer" if outer_GN is not None else "inner" if inner_GK is not None else None
    static = pallas_tpu_forward.Static(_round_up(M), K, N, G, transpose_rhs, which, fragment, target.num_cores, tiles)
    how = dict(static=static, out_dtype=jnp.dtype(out_dtype), interpret=interpret)
    return _matmul(lhs_MK, quantized.values(rhs), inner_GK if outer_GN is None else outer_GN, sizes_L, offset, **how)


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
        tiles = pallas_tpu_tiles.drhs_tiles(_round_up(M), A, B, num_groups, left_MA.dtype, target)
    static = pallas_tpu_drhs.Static(_round_up(M), A, B, num_groups, fragment, target.num_cores, tiles)
    return _weight_gradient(left_MA, right_MB, sizes_L, offset, static=static, interpret=interpret)


# Compiled functions only so that calls of the same shapes are traced once: tracing a kernel takes a tenth of a second,
# and happens on every platform.
@functools.partial(jax.jit, static_argnames=("static", "out_dtype", "interpret"))
def _matmul(lhs_MK, rhs, scale_GX, sizes_L, offset, *, static, out_dtype, interpret):
    out_MN = pallas_tpu_forward.matmul(
        _pad_rows(lhs_MK),
        rhs,
        None if scale_GX is None else scale_GX[:, None],
        *_scalars(sizes_L, offset),
        static=static,
        out_dtype=out_dtype,
        interpret=_interpret(interpret),
    )
    return out_MN[: lhs_MK.shape[0]]


@functools.partial(jax.jit, static_argnames=("static", "interpret"))
def _weight_gradient(left_MA, right_MB, sizes_L, offset, *, static, interpret):
    return pallas_tpu_drhs.weight_gradient(
        _pad_rows(left_MA),
        _pad_rows(right_MB),
        *_scalars(sizes_L, offset),
        static=static,
        interpret=_interpret(interpret),
    )


def _interpret(interpret: bool) -> Any:
    # Memory starts out as NaN: what a kernel must not use shows.
    return pltpu.InterpretParams() if interpret else False


def _round_up(M: int) -> int:
    return -(-M // _ROWS) * _ROWS


def _pad_rows(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % _ROWS), (0, 0)))


def _scalars(sizes_L: Array, offset: Array | None) -> tuple[Array, Array]:
    if offset is None:
        offset = _varying.zeros_like_varying((), jnp.int32, sizes_L)
    return sizes_L.astype(jnp.int32), offset.reshape(1)
