"""The grouped matmul by `jax.lax.ragged_dot_general`: what XLA offers on every platform.

Dims as in api.py. XLA's TPU compiler has a kernel for it; on CPU it multiplies every row by every group's matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups, quantized
from pallas_kernels.quantized import Weights


def _dims(contract: tuple[int, int], group_dim: int | None) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=() if group_dim is None else (group_dim,),
    )


def matmul(
    lhs_MK: Array, rhs: Weights, sizes_L: Array, offset: Array | None, *, transpose_rhs: bool, out_dtype: Any
) -> Array:
    """out (M, N): each row times its group's matrix."""
    (M, dtype), inner = (lhs_MK.shape[0], lhs_MK.dtype), 2 if transpose_rhs else 1
    starts_G, ends_G = _groups.group_bounds(sizes_L, offset, rhs.shape[0], M)
    inner_GK, outer_GN = quantized.scales(rhs, inner)
    if inner_GK is not None:
        lhs_MK = (lhs_MK * _groups.take_groups(inner_GK, ends_G, M)).astype(dtype)
    out_MN = jax.lax.ragged_dot_general(
        _to_front(_clean(lhs_MK, starts_G, ends_G), starts_G, offset),
        quantized.values(rhs).astype(dtype),
        ends_G - starts_G,
        _dims((1, inner), group_dim=0),
        preferred_element_type=_checks.accumulator(dtype),
    )
    out_MN = _from_front(out_MN, starts_G, offset)
    if outer_GN is not None:
        out_MN = out_MN * _groups.take_groups(outer_GN, ends_G, M)
    # Not every lowering defines the rows beyond the last group.
    return _clean(out_MN.astype(out_dtype), starts_G, ends_G)


def weight_gradient(left_MA: Array, right_MB: Array, sizes_L: Array, offset: Array | None, *, num_groups: int) -> Array:
    """left.T @ right over each group's rows: (G, A, B)."""
    starts_G, ends_G = _groups.group_bounds(sizes_L, offset, num_groups, left_MA.shape[0])
    front = lambda x: _to_front(_clean(x, starts_G, ends_G), starts_G, offset)
    return jax.lax.ragged_dot_general(
        front(left_MA),
        front(right_MB),
        ends_G - starts_G,
        _dims((0, 0), group_dim=None),
        preferred_element_type=_checks.accumulator(left_MA.dtype),
    ).astype(left_MA.dtype)


def _clean(x: Array, starts_G: Array, ends_G: Array) -> Array:
    return jnp.where(_groups.live_rows(starts_G, ends_G, x.shape[0]), x, 0)


def _to_front(x: Array, starts_G: Array, offset: Array | None) -> Array:
    """Moves the first live row to row 0: ragged_dot's own group_offset is not implemented on most platforms."""
    return x if offset is None else jnp.roll(x, -starts_G[0], axis=0)


def _from_front(x: Array, starts_G: Array, offset: Array | None) -> Array:
    return x if offset is None else jnp.roll(x, starts_G[0], axis=0)
