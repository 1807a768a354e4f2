"""GPU kernel (Pallas, Triton) of the weights' gradient: left.T @ right over each group's rows, in one launch.

A program owns one tile of one group's matrix and walks over the group's rows, so each tile is written once, sums stay
in registers, and a group without rows is written as zeros. Dims: M rows, G groups, A and B of a matrix; I rows of a
step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_schedule as schedule
from pallas_kernels._gpu_rows import dot
from pallas_kernels._gpu_tiles import Tiles

Ref = Any


@dataclasses.dataclass(frozen=True)
class _Call:
    M: int
    A: int
    B: int
    L: int
    tiles: Tiles


def weight_gradient(
    left: Array,
    right: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    num_groups: int,
    tiles: Tiles,
    left_index_M: Array | None = None,
    right_index_M: Array | None = None,
    interpret: bool = False,
) -> Array:
    """(G, A, B) in left's dtype. left: (M, A), or (X, A) gathered by its index; right likewise."""
    given = {
        "sizes": sizes_L.astype(jnp.int32),
        "offset": None if offset is None else offset.reshape(1),
        "left": left,
        "right": right,
        "left_index": left_index_M,
        "right_index": right_index_M,
    }
    M = left.shape[0] if left_index_M is None else left_index_M.shape[0]
    call = _Call(M, left.shape[1], right.shape[1], sizes_L.shape[0], tiles)
    operands, tree = jax.tree.flatten(given)
    per_group = -(-call.A // tiles.rows) * -(-call.B // tiles.cols)
    shape, axes = (num_groups, call.A, call.B), jax.typeof(left).manual_axis_type
    return pl.pallas_call(
        functools.partial(_kernel, call, tree),
        out_shape=jax.ShapeDtypeStruct(shape, left.dtype, manual_axis_type=axes),
        grid=(num_groups * per_group,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="weight_gradient",
    )(*operands)


def _kernel(call: _Call, tree: Any, *refs: Ref) -> None:
    given, out, t = jax.tree.unflatten(tree, refs[:-1]), refs[-1], call.tiles
    across, along = -(-call.A // t.rows), -(-call.B // t.cols)
    group = jax.lax.div(pl.program_id(0), jnp.int32(across * along))
    a, b = schedule.swizzled(pl.program_id(0) - group * (across * along), across, along, t.width)
    offset = jnp.int32(0) if given["offset"] is None else given["offset"][0]
    first, end = schedule.group_rows(given["sizes"], group + offset, num_rows=call.M, num_groups=call.L)
    a_A = a * t.rows + jax.lax.broadcasted_iota(jnp.int32, (t.rows,), 0)
    b_B = b * t.cols + jax.lax.broadcasted_iota(jnp.int32, (t.cols,), 0)

    def step(i: Array, sum_AB: Array) -> Array:
        row_I = first + i * t.inner + jax.lax.broadcasted_iota(jnp.int32, (t.inner,), 0)
        # rows of other groups may hold anything: they must be zero on both sides
        live_I, row_I = row_I < end, jnp.minimum(row_I, call.M - 1)
        left_IA = _load(given["left"], given["left_index"], row_I, live_I, a_A, call.A)
        right_IB = _load(given["right"], given["right_index"], row_I, live_I, b_B, call.B)
        return sum_AB + dot(left_IA, right_IB, (0, 0))

    steps = jax.lax.div(end - first + (t.inner - 1), jnp.int32(t.inner))
    sum_AB = jax.lax.fori_loop(0, steps, step, jnp.zeros((t.rows, t.cols), jnp.float32))
    mask_AB = jnp.broadcast_to((a_A < call.A)[:, None], sum_AB.shape) & (b_B < call.B)[None, :]
    whole = call.A % t.rows == 0 and call.B % t.cols == 0
    at = out.at[group, a_A[:, None], b_B[None, :]]
    plgpu.store(at, sum_AB.astype(out.dtype), mask=None if whole else mask_AB)


def _load(ref: Ref, index: Ref | None, row_I: Array, live_I: Array, col_C: Array, width: int) -> Array:
    if index is not None:
        row_I = plgpu.load(index.at[row_I])
        live_I, row_I = live_I & (row_I < ref.shape[0]), jnp.minimum(row_I, ref.shape[0] - 1)
    # beyond the last column: any column, whose sums are not stored
    at = ref.at[row_I[:, None], jnp.minimum(col_C, width - 1)[None, :] if width % col_C.shape[0] else col_C[None, :]]
    return plgpu.load(at, mask=jnp.broadcast_to(live_I[:, None], (row_I.shape[0], col_C.shape[0])), other=0)
