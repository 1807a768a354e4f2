"""The definition, in plain jnp: every group's matrix on every row, rows of other groups masked. For tests.

Dims as in api.py.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups
from pallas_kernels.quantized import Quantized, Weights


def matmul(
    lhs_MK: Array, rhs: Weights, sizes_L: Array, offset: Array | None, *, transpose_rhs: bool, out_dtype: Any
) -> Array:
    """out (M, N): each row times its group's matrix."""
    starts_G, ends_G = _groups.group_bounds(sizes_L, offset, rhs.shape[0], lhs_MK.shape[0])
    member_GM = _groups.membership(starts_G, ends_G, lhs_MK.shape[0])
    if isinstance(rhs, Quantized):
        rhs = rhs.dequantized(_checks.accumulator(lhs_MK.dtype))
    lhs_GMK = jnp.where(member_GM[:, :, None], lhs_MK, 0)
    out_MN = jnp.einsum(
        "gmk,gnk->mn" if transpose_rhs else "gmk,gkn->mn",
        lhs_GMK,
        rhs,
        preferred_element_type=_checks.accumulator(lhs_MK.dtype),
    ).astype(out_dtype)
    # Changes no value: it keeps what the gradient holds in dead rows out of the weights' gradient.
    return jnp.where(_groups.live_rows(starts_G, ends_G, lhs_MK.shape[0]), out_MN, 0)
