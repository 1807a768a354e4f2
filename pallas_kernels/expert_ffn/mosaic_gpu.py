"""The expert network's calls of Pallas kernels for one generation of GPU, compute capability 9.0 (H100): TMA and wgmma.

By name only, as grouped_matmul's: nobody has timed them. Dims as in api.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import _mosaic_ring, _mosaic_rows
from pallas_kernels.expert_ffn.gpu_epilogues import Hidden, HiddenAndGradients
from pallas_kernels.expert_ffn.in_kernels import Gradients, Groups, ways_back
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.quantized import Weights


def why_not(x_RD: Array, w_gate_EDF: Weights | None, w_up_EDF: Weights, w_down_EFD: Weights) -> str | None:
    """Why the kernels, of the forward pass and of all gradients, can't take these operands; None if they can."""
    hidden_RF = jax.ShapeDtypeStruct((x_RD.shape[0], w_up_EDF.shape[2]), x_RD.dtype)
    pairs = [(x_RD, w_gate_EDF), (x_RD, w_up_EDF), (hidden_RF, w_down_EFD)]
    how = dict(transpose_rhs=False, out_dtype=x_RD.dtype)
    reasons = [grouped.why_not_operands(rows, w, **how) for rows, w in pairs if w is not None]
    return next(filter(None, reasons), None) or grouped.why_not_here()


def up(
    x_RD: Array, w_gate_EDF: Array | None, w_up_EDF: Array, groups: Groups, *, activation: str, save: bool
) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved."""
    weights = [w_up_EDF] if w_gate_EDF is None else [w_gate_EDF, w_up_EDF]
    how = dict(transpose_rhs=False, sums=len(weights), outs=1 + save * len(weights), epilogue=Hidden(activation, save))
    hidden_RF, *pre = _call([x_RD], weights, groups, **how)
    if not save:
        return hidden_RF, None, None
    return hidden_RF, None if w_gate_EDF is None else pre[0], pre[-1]


def down(hidden_RF: Array, w_down_EFD: Array, groups: Groups) -> Array:
    """y (R, D)."""
    return _call([hidden_RF], [w_down_EFD], groups, transpose_rhs=False)[0]


def dhidden(
    dy_RD: Array, w_down_EFD: Array, gate_RF: Array | None, up_RF: Array, groups: Groups, *, activation: str
) -> Gradients:
    """From the gradient of y and the saved pre-activations."""
    pre = [up_RF] if gate_RF is None else [gate_RF, up_RF]
    how = dict(transpose_rhs=True, outs=1 + len(pre), epilogue=HiddenAndGradients(activation))
    hidden_RF, *d = _call([dy_RD], [w_down_EFD], groups, sides=pre, **how)
    return Gradients(hidden_RF, None if gate_RF is None else d[0], d[-1])


def dx(d: Gradients, w_gate_EDF: Array | None, w_up_EDF: Array, groups: Groups) -> Array:
    """dx (R, D): both ways back in one sum."""
    return _call(*ways_back(d, w_gate_EDF, w_up_EDF), groups, transpose_rhs=True)[0]


def weight_gradient(left_RA: Array, right_RB: Array, groups: Groups, *, num_experts: int) -> Array:
    """left.T @ right over each expert's rows: (E, A, B)."""
    how = dict(num_groups=num_experts, interpret=groups.interpret)
    return grouped.weight_gradient(left_RA, right_RB, groups.sizes_L, groups.offset, **how)


def _call(
    rows: list[Array],
    weights: list[Array],
    groups: Groups,
    *,
    transpose_rhs: bool,
    sides: Sequence[Array] = (),
    **how: Any,
) -> list[Array]:
    """The row kernel; see _mosaic_rows.Call."""
    (R, K), E = rows[0].shape, weights[0].shape[0]
    N = weights[0].shape[1 if transpose_rhs else 2]
    call = _mosaic_rows.Call(
        R, K, N, E, groups.sizes_L.shape[0], transpose_rhs, _mosaic_ring.num_cores(groups.interpret),
        walks=len(rows), sides=len(sides), **how,
    )  # fmt: skip
    return _run(call, rows, weights, groups.sizes_L, groups.offset, sides=list(sides), interpret=groups.interpret)


# Jitted for the cache: layers of one shape are traced once.
_run = jax.jit(_mosaic_rows.matmul_rows, static_argnums=0, static_argnames="interpret")
