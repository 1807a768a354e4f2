"""The expert network's calls of Pallas GPU kernels (in_kernels.py says what is computed in which).

Dims as in api.py; X rows, or tokens of which rows are gathered on the way into a kernel (see routed_ffn).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _gpu_rows, _gpu_target, _gpu_tiles, _gpu_weights
from pallas_kernels._gpu_rows import Product
from pallas_kernels.expert_ffn.gpu_epilogues import Hidden, HiddenAndGradients
from pallas_kernels.expert_ffn.in_kernels import Gradients, Groups, ways_back
from pallas_kernels.grouped_matmul import pallas_gpu as grouped
from pallas_kernels.quantized import Weights

why_not = grouped.why_not
#: Columns that an epilogue of many terms takes at a time: more of them don't fit into registers.
_PART = 32


def up(
    x_XD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    groups: Groups,
    *,
    activation: str,
    save: bool,
    token_R: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved. Rows are x, or with `token` x[token]."""
    weights = [w_up_EDF] if w_gate_EDF is None else [w_gate_EDF, w_up_EDF]
    phase = tuple(Product(0, i, i) for i in range(len(weights)))
    outs = 1 + save * len(weights)
    how = dict(phases=(phase,), transpose_rhs=False, epilogue=Hidden(activation, save), outs=outs, sums=len(weights))
    # one sum alone fills the registers with what an activation is applied to
    how |= dict(part_cols=_PART if w_gate_EDF is None else 0)
    hidden_RF, *pre = _call([x_XD], weights, groups, index=token_R, **how)
    if not save:
        return hidden_RF, None, None
    return hidden_RF, None if w_gate_EDF is None else pre[0], pre[-1]


def down(hidden_RF: Array, w_down_EFD: Weights, groups: Groups) -> Array:
    """y (R, D)."""
    how = dict(phases=((Product(0, 0, 0),),), transpose_rhs=False, epilogue=_gpu_rows.store, outs=1, sums=1)
    return _call([hidden_RF], [w_down_EFD], groups, **how)[0]


def dhidden(
    dy_XD: Array,
    w_down_EFD: Weights,
    gate_RF: Array | None,
    up_RF: Array,
    groups: Groups,
    *,
    activation: str,
    token_R: Array | None = None,
    scale_R: Array | None = None,
) -> Gradients:
    """From dy, or with `token` from dy[token]; the hidden layer and the gradients times the scale, if there is one."""
    pre, scaled = ([up_RF] if gate_RF is None else [gate_RF, up_RF]), scale_R is not None
    how = dict(
        outs=1 + len(pre), row_sums=int(scaled), sums=1, epilogue=HiddenAndGradients(activation), part_cols=_PART
    )
    hidden_RF, *d = _call(
        [dy_XD], [w_down_EFD], groups, index=token_R, row_inputs=pre, scale=scale_R,
        phases=((Product(0, 0, 0),),), transpose_rhs=True, **how,
    )  # fmt: skip
    dscale_R = jnp.sum(d.pop(), axis=0) if scaled else None
    return Gradients(hidden_RF, None if gate_RF is None else d[0], d[-1], dscale_R)


def dx(d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups) -> Array:
    """dx (R, D): both ways back in one sum."""
    rows, weights = ways_back(d, w_gate_EDF, w_up_EDF)
    phases = tuple((Product(i, i, 0),) for i in range(len(rows)))
    return _call(rows, weights, groups, phases=phases, transpose_rhs=True, epilogue=_gpu_rows.store, outs=1, sums=1)[0]


def weight_gradient(
    left_XA: Array,
    right_XB: Array,
    groups: Groups,
    *,
    num_experts: int,
    left_token_R: Array | None = None,
    right_token_R: Array | None = None,
) -> Array:
    """left.T @ right over each expert's rows: (E, A, B)."""
    A, B = left_XA.shape[1], right_XB.shape[1]
    R = next(a for a in (left_token_R, right_token_R, left_XA) if a is not None).shape[0]
    gathers = left_token_R is not None or right_token_R is not None
    target = _gpu_target.current() or _gpu_target.SMALLEST
    tiles = _gpu_tiles.weight_tiles(R, A, B, num_experts, left_XA.dtype.itemsize, target, gathers=gathers)
    return _weights(
        left_XA, right_XB, groups.sizes_L, groups.offset, num_groups=num_experts, tiles=tiles,
        left_index_M=left_token_R, right_index_M=right_token_R, interpret=groups.interpret,
    )  # fmt: skip


def _call(
    rows: list[Array],
    weights: list[Weights],
    groups: Groups,
    *,
    phases: Any,
    transpose_rhs: bool,
    epilogue: Any,
    outs: int,
    sums: int,
    row_sums: int = 0,
    part_cols: int = 0,
    index: Array | None = None,
    row_inputs: list[Array] | tuple[()] = (),
    scale: Array | None = None,
) -> list[Array]:
    """The row kernel with tiles for the target at hand; `sums` of a tile's size fill its registers."""
    R, dtype = (rows[0] if index is None else index).shape[0], rows[0].dtype
    E, *sides = weights[0].shape
    K, N = reversed(sides) if transpose_rhs else sides
    target = _gpu_target.current() or _gpu_target.SMALLEST
    tiles = _gpu_tiles.row_tiles(R, K, N, E, dtype.itemsize, target, rhs=len(phases[0]), sums=sums)
    parts = max(1, tiles.cols // part_cols) if part_cols else 1
    shape = (R, K, N, E, groups.sizes_L.shape[0])
    call = _gpu_rows.Call(*shape, phases, transpose_rhs, tiles, (dtype,) * outs, epilogue, row_sums, parts)
    how = dict(index_M=index, row_inputs=tuple(row_inputs), scale_M=scale, call=call, interpret=groups.interpret)
    return _run(tuple(rows), tuple(weights), groups.sizes_L, groups.offset, **how)


# Jitted for the cache: layers of one shape are traced once.
@functools.partial(jax.jit, static_argnames=("call", "interpret"))
def _run(rows, weights, sizes_L, offset, *, call, **how):
    return _gpu_rows.matmul_rows(call, rows, weights, sizes_L, offset, **how)


_weights = jax.jit(_gpu_weights.weight_gradient, static_argnames=("num_groups", "tiles", "interpret"))
