"""The grouped matmul as Pallas kernels for one generation of GPU, compute capability 9.0 (H100): TMA and wgmma.

By name only: nobody has timed them. Interpreted, with jax 0.12, they equal the reference. Dims as in api.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_target, _mosaic_ring, _mosaic_rows, _mosaic_weights
from pallas_kernels.quantized import Quantized, Weights

_LANES = 128


def why_not(lhs_MK: Array, rhs: Weights, *, transpose_rhs: bool, out_dtype: Any) -> str | None:
    """Why the kernels, of the forward pass and of both gradients, can't take these operands; None if they can."""
    return why_not_operands(lhs_MK, rhs, transpose_rhs=transpose_rhs, out_dtype=out_dtype) or why_not_here()


def why_not_operands(lhs_MK: Array, rhs: Weights, *, transpose_rhs: bool, out_dtype: Any) -> str | None:
    """Whatever they are compiled for."""
    M, K = lhs_MK.shape
    N = rhs.shape[1 if transpose_rhs else 2]
    dtypes = {str(a) for a in (lhs_MK.dtype, rhs.dtype, jnp.dtype(out_dtype))}
    if isinstance(rhs, Quantized) or dtypes != {"bfloat16"}:
        return f"the kernel takes and gives bfloat16, not {', '.join(sorted(dtypes))}"
    if M < _mosaic_ring.ROWS or M % _mosaic_ring.ALIGN or K % _LANES or N % _LANES or not K or not N:
        return (
            f"the kernel takes {_mosaic_ring.ROWS} rows or more, a multiple of {_mosaic_ring.ALIGN}, and K and N that "
            f"are multiples of {_LANES}, not {M}, {K} and {N}"
        )
    return None


def why_not_here() -> str | None:
    """Whatever the operands are."""
    target = _gpu_target.current()
    if target is not None and target.capability != 90:
        return f"the kernel is for compute capability 9.0, the device has {target.capability / 10:.1f}"
    if target is None and not hasattr(plgpu, "InterpretGPUParams"):
        return "interpreting the kernel needs jax 0.12"
    return None


def matmul(
    lhs_MK: Array,
    rhs: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    transpose_rhs: bool,
    out_dtype: Any,
    interpret: bool = False,
) -> Array:
    """out (M, N): each row times its group's matrix."""
    (M, K), G = lhs_MK.shape, rhs.shape[0]
    N = rhs.shape[1 if transpose_rhs else 2]
    call = _mosaic_rows.Call(M, K, N, G, sizes_L.shape[0], transpose_rhs, _mosaic_ring.num_cores(interpret))
    return _matmul(lhs_MK, rhs, sizes_L, offset, call=call, interpret=interpret)


def weight_gradient(
    left_MA: Array, right_MB: Array, sizes_L: Array, offset: Array | None, *, num_groups: int, interpret: bool = False
) -> Array:
    """left.T @ right over each group's rows: (G, A, B)."""
    (M, A), B = left_MA.shape, right_MB.shape[1]
    call = _mosaic_weights.Call(M, A, B, num_groups, _mosaic_ring.num_cores(interpret))
    return _weight_gradient(call, left_MA, right_MB, sizes_L, offset, interpret=interpret)


# Compiled functions only so that calls of the same shapes are traced once.
@functools.partial(jax.jit, static_argnames=("call", "interpret"))
def _matmul(lhs_MK, rhs, sizes_L, offset, *, call, interpret):
    return _mosaic_rows.matmul_rows(call, [lhs_MK], [rhs], sizes_L, offset, interpret=interpret)[0]


_weight_gradient = jax.jit(_mosaic_weights.weight_gradient, static_argnums=0, static_argnames="interpret")
