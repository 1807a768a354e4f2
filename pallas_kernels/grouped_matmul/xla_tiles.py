"""The grouped matmul as a loop over groups and row tiles: work follows the live rows, weights are read in place.

Dims as in api.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups, _tiles, _varying
from pallas_kernels.quantized import Quantized, Weights


def matmul(
    lhs_MK: Array, rhs: Weights, sizes_L: Array, offset: Array | None, *, transpose_rhs: bool, out_dtype: Any
) -> Array:
    """out (M, N): each row times its group's matrix."""
    M, G = lhs_MK.shape[0], rhs.shape[0]
    N = rhs.shape[1 if transpose_rhs else 2]
    out_MN = _varying.zeros_like_varying((M, N), out_dtype, lhs_MK)
    if M == 0:
        return out_MN
    starts_G, ends_G = _groups.group_bounds(sizes_L, offset, G, M)
    sizes = _tiles.tile_sizes(M, G)

    def group(out_MN: Array, g: Array) -> Array:
        w = _tiles.pick_group(rhs, g, lhs_MK.dtype)

        def tile(out_MN: Array, row: Array, rows: int, live: Array | None, opens: bool) -> Array:
            lhs_rK = _tiles.take_rows(lhs_MK, row, rows)
            out_rN = _tiles.dot(lhs_rK, w, (1, 1 if transpose_rhs else 0))
            return _tiles.put_rows(out_MN, out_rN, row, live)

        return _tiles.for_each_tile(starts_G[g], ends_G[g], M, sizes, tile, out_MN)

    return _tiles.for_each_group(starts_G, ends_G, group, out_MN, skip_empty=isinstance(rhs, Quantized))


def weight_gradient(left_MA: Array, right_MB: Array, sizes_L: Array, offset: Array | None, *, num_groups: int) -> Array:
    """left.T @ right over each group's rows: (G, A, B)."""
    (M, A), B = left_MA.shape, right_MB.shape[1]
    acc = _checks.accumulator(left_MA.dtype)
    out_GAB = _varying.zeros_like_varying((num_groups, A, B), left_MA.dtype, left_MA)
    if M == 0:
        return out_GAB
    starts_G, ends_G = _groups.group_bounds(sizes_L, offset, num_groups, M)
    sizes = _tiles.tile_sizes(M, num_groups)

    def group(g: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def tile(sum_AB: Array, row: Array, rows: int, live: Array | None, opens: bool) -> Array:
            left_rA, right_rB = (_tiles.take_rows(x, row, rows, live) for x in (left_MA, right_MB))
            return _tiles.add_matrix(sum_AB, _tiles.dot(left_rA, right_rB, (0, 0)), opens)

        out_GAB, sum_AB = carry
        sum_AB = _tiles.for_each_tile(starts_G[g], ends_G[g], M, sizes, tile, sum_AB)
        return _tiles.put_matrix(out_GAB, sum_AB, g, ends_G[g] > starts_G[g]), sum_AB

    sum_AB = _varying.zeros_like_varying((A, B), acc, left_MA)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_groups), group, (out_GAB, sum_AB))[0]
