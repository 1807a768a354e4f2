"""Public entry of the grouped matmul: checks, choice of implementation, derivatives.

Dims: M rows, K inner, N out, G groups of the weights, L groups in the sizes (L = G without an offset).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _choose, _varying, quantized
from pallas_kernels.grouped_matmul import mosaic_gpu, pallas_gpu, pallas_tpu, reference, xla, xla_tiles
from pallas_kernels.quantized import Quantized, Weights

_OP = "grouped_matmul"
_FORWARD = {
    "xla": xla.matmul,
    "xla_tiles": xla_tiles.matmul,
    "pallas_tpu": pallas_tpu.matmul,
    "pallas_gpu": pallas_gpu.matmul,
    "mosaic_gpu": mosaic_gpu.matmul,
}
_WEIGHT_GRADIENT = {
    "xla": xla.weight_gradient,
    "xla_tiles": xla_tiles.weight_gradient,
    "pallas_tpu": pallas_tpu.weight_gradient,
    "pallas_gpu": pallas_gpu.weight_gradient,
    "mosaic_gpu": mosaic_gpu.weight_gradient,
}


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G K N"] | Float[Array, "G N K"] | Quantized,
    group_sizes_L: Int[Array, " L"],
    *,
    transpose_rhs: bool = False,
    group_offset: Int[Array, ""] | int | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """out[m] = lhs[m] @ rhs[group of row m], for rows sorted by group.

    Group g owns the group_sizes[g] rows after those of the groups before it. Rows beyond sum(group_sizes) give exactly
    0, in value and in gradient, whatever they hold. Sums run in float32 at least.

    Args:
      lhs_MK: rows.
      rhs_GKN: one matrix per group, of lhs's dtype; (G, N, K) with `transpose_rhs`, used in place. Or `Quantized`
        matrices, which are widened where they are multiplied; lhs has a gradient then, they have none.
      group_sizes_L: integers, non-negative, with a sum of at most M; one per group.
      transpose_rhs: multiply by the transpose of each matrix.
      group_offset: int scalar, may be traced. rhs then holds only groups [group_offset, group_offset + G) of the L
        groups in group_sizes; rows of other groups give 0. Must lie in [0, L - G].
      preferred_element_type: dtype of the result; lhs's by default.
      implementation: "reference", "xla" (`jax.lax.ragged_dot`), "xla_tiles" (loops over row tiles, for CPUs),
        "pallas_tpu" and "pallas_gpu" (bfloat16 and float32; interpreted when lowered for a CPU), or None to choose by
        platform: "pallas_tpu" on TPU if it takes the operands and K and N are multiples of 128, "pallas_gpu" where
        this is traced for an NVIDIA GPU, "xla_tiles" on CPU, else "xla". "mosaic_gpu", by name only: bfloat16 on GPUs
        of compute capability 9.0.

    Raises:
      ValueError, TypeError: shapes or dtypes that don't fit, an unknown implementation, or the gradient of a quantized
        rhs.
      NotImplementedError: a kernel that doesn't exist yet, or can't take these operands.

    Differentiable in lhs and rhs, in reverse mode only. Source: MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    arrays = (lhs_MK, rhs_GKN, group_sizes_L, group_offset)
    lhs_MK, rhs_GKN, group_sizes_L, offset = jax.tree.map(jnp.asarray, arrays)
    shapes = _checks.describe(lhs=lhs_MK, rhs=rhs_GKN, group_sizes=group_sizes_L, group_offset=offset)
    _check(lhs_MK, rhs_GKN, group_sizes_L, offset, transpose_rhs, shapes)
    out_dtype = jnp.dtype(lhs_MK.dtype if preferred_element_type is None else preferred_element_type)
    why_not = _why_not(transpose_rhs, out_dtype, implementation, lhs_MK, rhs_GKN, group_sizes_L)
    implementation = _choose.check_implementation(_OP, implementation, shapes, why_not)
    offset = None if offset is None else offset.astype(jnp.int32)
    operands = _varying.same_varying(lhs_MK, quantized.frozen(_OP, rhs_GKN), group_sizes_L, offset)
    if implementation == "reference":
        return reference.matmul(*operands, transpose_rhs=transpose_rhs, out_dtype=out_dtype)
    return _grouped_matmul(transpose_rhs, out_dtype, implementation, *operands)


def _check(lhs_MK: Array, rhs: Weights, sizes_L: Array, offset: Array | None, transpose_rhs: bool, shapes: str) -> None:
    _checks.check_rank(_OP, "lhs", lhs_MK, "M K")
    _checks.check_rank(_OP, "rhs", rhs, "G N K" if transpose_rhs else "G K N")
    inner = 2 if transpose_rhs else 1
    _checks.check_equal(_OP, f"dim {inner} of rhs (K of lhs)", rhs.shape[inner], lhs_MK.shape[1], shapes)
    _checks.check_same_float_dtype(_OP, shapes, lhs=lhs_MK, rhs=rhs)
    _checks.check_groups(_OP, sizes_L, rhs.shape[0], offset, shapes)


def _why_not(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L) -> dict[str, str | None]:
    """Why each kernel can't take these operands; None if it can."""
    how = dict(out_dtype=out_dtype, asked=implementation)
    return {
        "pallas_tpu": pallas_tpu.why_not(lhs_MK, rhs, transpose_rhs=transpose_rhs, **how),
        "pallas_gpu": pallas_gpu.why_not(lhs_MK, rhs, num_groups=sizes_L.shape[0], **how),
        "mosaic_gpu": mosaic_gpu.why_not(lhs_MK, rhs, transpose_rhs=transpose_rhs, out_dtype=out_dtype),
    }


def _table(entries: Mapping[str, Callable[..., Any]], why_not: Mapping[str, str | None], **how: Any):
    """The implementations that take these operands, with their keyword arguments."""
    return {name: functools.partial(f, **how) for name, f in entries.items() if why_not.get(name) is None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_matmul(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L, offset):
    why_not = _why_not(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L)
    table = _table(_FORWARD, why_not, transpose_rhs=transpose_rhs, out_dtype=out_dtype)
    return _choose.run(implementation, table, lhs_MK, rhs, sizes_L, offset)


def _forward(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L, offset):
    out_MN = _grouped_matmul(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L, offset)
    return out_MN, (lhs_MK, rhs, sizes_L, offset)


def _backward(transpose_rhs, out_dtype, implementation, saved, dout_MN):
    lhs_MK, rhs, sizes_L, offset = saved
    dout_MN = dout_MN.astype(lhs_MK.dtype)
    dlhs_MK = _grouped_matmul(not transpose_rhs, lhs_MK.dtype, implementation, dout_MN, rhs, sizes_L, offset)
    if isinstance(rhs, Quantized):
        return dlhs_MK, None, None, None
    # The gradient of a (G, N, K) matrix is the same contraction with its sides exchanged.
    left, right = (dout_MN, lhs_MK) if transpose_rhs else (lhs_MK, dout_MN)
    why_not = _why_not(transpose_rhs, out_dtype, implementation, lhs_MK, rhs, sizes_L)
    table = _table(_WEIGHT_GRADIENT, why_not, num_groups=rhs.shape[0])
    drhs = _choose.run(implementation, table, left, right, sizes_L, offset)
    return dlhs_MK, drhs, None, None


_grouped_matmul.defvjp(_forward, _backward)
