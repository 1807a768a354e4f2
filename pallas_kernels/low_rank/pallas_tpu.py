"""The dense low-rank product as Pallas TPU kernels: one pass over the tokens forward, one backward.

All experts' ranks lie side by side along lanes, L = E R of them. A step of the grid takes a block of tokens:
h = x A^T, times the gates of each lane's expert, times B. h stays on the chip, A and B are fetched once. Gates and ids
come with tokens along lanes, where a few numbers of a token are no waste; a product with zeros and ones gives every
lane its expert's gate, and turns them. Backward h is made anew, and the gradients of A and B are summed in float32 on
the chip while the tokens pass by.

Dims as in api.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_target
from pallas_kernels._tpu_target import MIB

#: Tokens of a step, whole lane tiles.
_BLOCKS = (256, 128)
#: One comparison per choice and expert; more are better served by one gate per expert.
_MOST_CHOICES = 16
#: The ranks of a token are not split.
_MOST_RANKS = 4096


@dataclasses.dataclass(frozen=True)
class _Static:
    """`block` tokens of a step; `by_ids`: gates come with ids."""

    T: int
    D: int
    N: int
    E: int
    R: int
    X: int
    by_ids: bool
    has_onto: bool
    block: int
    vmem_limit_bytes: int

    @property
    def L(self) -> int:
        return self.E * self.R

    @property
    def steps(self) -> int:
        return -(-self.T // self.block)


def refusal(x_TD: Array, b_ERN: Array, gates_TX: Array, ids_TK: Array | None) -> str | None:
    """Why the kernels, of both passes, cannot take these operands; None if they can."""
    (T, D), (E, R, N) = x_TD.shape, b_ERN.shape
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, not {x_TD.dtype}"
    if 0 in (T, D, N, E * R, gates_TX.shape[1]):
        return "there is nothing to compute"
    if E * R > _MOST_RANKS:
        return f"the kernel takes at most {_MOST_RANKS} ranks in all, E R = {E * R}"
    if ids_TK is not None and ids_TK.shape[1] > _MOST_CHOICES:
        return f"the kernel takes at most {_MOST_CHOICES} ids of a token; give it one gate per expert"
    target = _tpu_target.current()
    if _block(T, D, N, E * R, x_TD.dtype.itemsize, target, True) is None:
        return f"ranks {E * R} of D {D} and N {N} don't fit into the {target.vmem_bytes // MIB} MiB of vector memory"
    return None


def _block(T: int, D: int, N: int, L: int, itemsize: int, target: _tpu_target.Target, backward: bool) -> int | None:
    """The most tokens of a step that fit; None if none do."""
    L = -(-L // 128) * 128
    weights = L * (D + N) * (itemsize + (8 if backward else 0))  # gradients: the sums, and a product before it is added
    row = itemsize * 2 * (2 * D + N if backward else D + 2 * N) + 4 * (4 * L + max(D, N))
    room = target.vmem_bytes - 8 * MIB - weights
    fit = [block for block in _BLOCKS if block * row <= room]
    return min(fit[0], T) if fit else None


def _static(x_TD, b_ERN, gates_TX, ids_TK, onto_TN, backward: bool) -> _Static:
    (T, D), (E, R, N), target = x_TD.shape, b_ERN.shape, _tpu_target.current()
    block = _block(T, D, N, E * R, x_TD.dtype.itemsize, target, backward)
    by_ids, limit = ids_TK is not None, target.vmem_bytes - 8 * MIB
    return _Static(T, D, N, E, R, gates_TX.shape[1], by_ids, onto_TN is not None, block, limit)


def forward(
    x_TD: Array,
    a_ERD: Array,
    b_ERN: Array,
    gates_TX: Array,
    ids_TK: Array | None,
    onto_TN: Array | None,
    *,
    interpret: bool = False,
) -> Array:
    """out (T, N)."""
    static = _static(x_TD, b_ERN, gates_TX, ids_TK, onto_TN, backward=False)
    return _forward(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN, static=static, interpret=interpret)


def backward(
    x_TD: Array,
    a_ERD: Array,
    b_ERN: Array,
    gates_TX: Array,
    ids_TK: Array | None,
    dout_TN: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """(dx, da, db, dgates)."""
    static = _static(x_TD, b_ERN, gates_TX, ids_TK, None, backward=True)
    return _backward(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, dout_TN, static=static, interpret=interpret)


# Compiled functions only so that calls of the same shapes are traced once.
@functools.partial(jax.jit, static_argnames=("static", "interpret"))
def _forward(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN, *, static, interpret):
    s, wide = static, x_TD.dtype.itemsize
    operands = [x_TD, a_ERD.reshape(s.L, s.D), b_ERN.reshape(s.L, s.N), gates_TX.astype(jnp.float32).T]
    specs = [_tokens(s, s.D), _whole(s.L, s.D), _whole(s.L, s.N), _along_lanes(s)]
    if ids_TK is not None:
        operands, specs = [*operands, ids_TK.astype(jnp.int32).T], [*specs, _along_lanes(s)]
    if onto_TN is not None:
        operands, specs = [*operands, onto_TN], [*specs, _tokens(s, s.N)]
    return pl.pallas_call(
        functools.partial(_forward_kernel, s),
        grid=(s.steps,),
        in_specs=specs,
        out_specs=_tokens(s, s.N),
        out_shape=_like(x_TD, (s.T, s.N), x_TD.dtype),
        compiler_params=_params(s),
        cost_estimate=_cost(s, 2, wide * (s.T * (s.D + s.N * (1 + s.has_onto)) + s.L * (s.D + s.N))),
        interpret=_interpret(interpret),
        name="low_rank_forward",
    )(*operands)


@functools.partial(jax.jit, static_argnames=("static", "interpret"))
def _backward(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, dout_TN, *, static, interpret):
    s, wide = static, x_TD.dtype.itemsize
    operands = [x_TD, a_ERD.reshape(s.L, s.D), b_ERN.reshape(s.L, s.N), gates_TX.astype(jnp.float32).T]
    specs = [_tokens(s, s.D), _whole(s.L, s.D), _whole(s.L, s.N), _along_lanes(s)]
    if ids_TK is not None:
        operands, specs = [*operands, ids_TK.astype(jnp.int32).T], [*specs, _along_lanes(s)]
    like = functools.partial(_like, x_TD)
    dx_TD, da_LD, db_LN, dgates_XT = pl.pallas_call(
        functools.partial(_backward_kernel, s),
        grid=(s.steps,),
        in_specs=[*specs, _tokens(s, s.N)],
        out_specs=[_tokens(s, s.D), _whole(s.L, s.D), _whole(s.L, s.N), _along_lanes(s)],
        out_shape=[
            like((s.T, s.D), x_TD.dtype),
            like((s.L, s.D), jnp.float32),
            like((s.L, s.N), jnp.float32),
            like((s.X, s.T), jnp.float32),
        ],
        compiler_params=_params(s),
        cost_estimate=_cost(s, 6, wide * s.T * (2 * s.D + s.N) + (wide + 4) * s.L * (s.D + s.N)),
        interpret=_interpret(interpret),
        name="low_rank_backward",
    )(*operands, dout_TN.astype(x_TD.dtype))
    gradient = lambda sum_LX, weights: sum_LX.reshape(weights.shape).astype(weights.dtype)
    return dx_TD, gradient(da_LD, a_ERD), gradient(db_LN, b_ERN), dgates_XT.T.astype(gates_TX.dtype)


def _interpret(interpret: bool) -> Any:
    # Memory starts out as NaN: what a kernel must not use shows.
    return pltpu.InterpretParams() if interpret else False


def _tokens(s: _Static, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((s.block, width), lambda i: (i, 0))


def _along_lanes(s: _Static) -> pl.BlockSpec:
    return pl.BlockSpec((s.X, s.block), lambda i: (0, i))


def _whole(*shape: int) -> pl.BlockSpec:
    """The same for all steps: one buffer is enough."""
    return pl.BlockSpec(shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))


def _like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _params(s: _Static) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=s.vmem_limit_bytes)


def _cost(s: _Static, products: int, bytes_accessed: int) -> pl.CostEstimate:
    flops = products * s.T * s.L * (s.D + s.N)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=bytes_accessed)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward_kernel(s: _Static, x, a, b, gates, *rest) -> None:
    *extra, out = rest
    ids = extra.pop(0) if s.by_ids else None
    h_TL = _dot(x[...], a[...], 1, 1) * _gates(s, gates, ids, x.dtype)
    out_TN = _dot(h_TL.astype(x.dtype), b[...], 1, 0)
    if s.has_onto:
        out_TN += extra[0][...].astype(jnp.float32)
    out[...] = out_TN.astype(out.dtype)


def _backward_kernel(s: _Static, x, a, b, gates, *rest) -> None:
    *extra, dout, dx, da, db, dgates = rest
    ids = extra[0] if s.by_ids else None
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        da[...] = jnp.zeros_like(da)
        db[...] = jnp.zeros_like(db)

    x_TD, dout_TN = _live(s, step, x[...]), _live(s, step, dout[...])
    gate_TL = _live(s, step, _gates(s, gates, ids, x.dtype))
    h_TL, dh_TL = _dot(x_TD, a[...], 1, 1), _dot(dout_TN, b[...], 1, 1)
    into_TL = (gate_TL * dh_TL).astype(x.dtype)
    dx[...] = _dot(into_TL, a[...], 1, 0).astype(dx.dtype)
    da[...] += _dot(into_TL, x_TD, 0, 0)
    db[...] += _dot((gate_TL * h_TL).astype(x.dtype), dout_TN, 0, 0)
    _put_gate_gradients(s, h_TL * dh_TL, ids, dgates)


def _live(s: _Static, step: Array, values: Array) -> Array:
    """Rows beyond the last token hold anything, and would reach the sums."""
    if s.T % s.block == 0:
        return values
    row_T1 = step * s.block + jax.lax.broadcasted_iota(jnp.int32, (s.block, 1), 0)
    return jnp.where(row_T1 < s.T, values, 0)


def _spread(s: _Static) -> Array:
    """(E, L): 1 where the lane is the expert's. In float arithmetic: vectors of integers are not divided on a TPU."""
    lane_EL = jax.lax.broadcasted_iota(jnp.int32, (s.E, s.L), 1).astype(jnp.float32)
    expert_EL = ((lane_EL + 0.5) * (1 / s.R)).astype(jnp.int32)
    return (jax.lax.broadcasted_iota(jnp.int32, (s.E, s.L), 0) == expert_EL).astype(jnp.float32)


def _hits(s: _Static, ids, k: int) -> Array:
    """(E, block): whether choice k of a token is the expert."""
    return jax.lax.broadcasted_iota(jnp.int32, (s.E, s.block), 0) == ids[k : k + 1, :]


def _gates(s: _Static, gates, ids, dtype: Any) -> Array:
    """(block, L) float32: the gate of each lane's expert."""
    gate_ET = gates[...]
    if ids is not None:
        gate_ET = sum(jnp.where(_hits(s, ids, k), gates[k : k + 1, :], 0.0) for k in range(s.X))
    return _dot(gate_ET.astype(dtype), _spread(s).astype(dtype), 0, 0)


def _put_gate_gradients(s: _Static, product_TL: Array, ids, dgates) -> None:
    """Sums over each gate's lanes."""
    own_ET = _dot(_spread(s), product_TL, 1, 1)
    if ids is None:
        dgates[...] = own_ET
        return
    for k in range(s.X):
        dgates[k : k + 1, :] = jnp.sum(jnp.where(_hits(s, ids, k), own_ET, 0.0), axis=0, keepdims=True)


def _dot(left: Array, right: Array, i: int, j: int) -> Array:
    """Sums over a dim of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32, precision=precision)
