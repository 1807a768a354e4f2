"""The grouped low-rank product as Pallas TPU kernels, on rows that are sorted by expert.

Each expert's rows begin a tile of their own, so that a tile has one expert: its two factors are fetched when the expert
changes, and the R numbers of a row between the two products never leave the chip. XLA gathers the rows and adds up each
token's (permute). Backward, an expert's gradients are summed in float32 on the chip while its tiles pass by.

Dims as in api.py; P rows, tiles filled up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _choose, _tpu_target
from pallas_kernels._tpu_target import MIB
from pallas_kernels.low_rank import xla
from pallas_kernels.route_top_k import expert_rows

#: Rows of a tile: few, for an expert's last one is part empty; enough to hide the fetch of its factors.
_ROWS = 128


class Tiles(NamedTuple):
    """`expert` of each tile, and how many there are: those behind have nothing to do."""

    expert: Array
    count: Array


def refusal(x_TD: Array, b_ERN: Array) -> str | None:
    """Why the kernels cannot take these operands; None if they can."""
    (T, D), (E, R, N) = x_TD.shape, b_ERN.shape
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, not {x_TD.dtype}"
    if 0 in (T, D, N, E * R):
        return "there is nothing to compute"
    wide, ranks, target = x_TD.dtype.itemsize, -(-R // 16) * 16, _tpu_target.current()
    need = 2 * _ROWS * (2 * D + N) * wide + ranks * (D + N) * (2 * wide + 12) + 4 * _ROWS * (max(D, N) + 512)
    if need > target.vmem_bytes - 8 * MIB:
        return f"a tile of D {D} and N {N} doesn't fit into the {target.vmem_bytes // MIB} MiB of vector memory"
    return None


def grouped(x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TK: Array, ids_TK: Array, onto_TN: Array | None) -> Array:
    """out (T, N), a token's own experts alone."""
    sizes_E, slot_TK = expert_rows(ids_TK, len(a_ERD))
    tiles, slot_TK, P = _plan(sizes_E, slot_TK, ids_TK)
    products = lambda x_PD, gate_P1: _rows(x_PD, a_ERD, b_ERN, gate_P1, tiles)
    return xla.on_rows(products, x_TD, gates_TK, slot_TK, P, onto_TN)


def _plan(sizes_E: Array, slot_TK: Array, ids_TK: Array) -> tuple[Tiles, Array, int]:
    """(tiles, row of each choice, P) from expert_rows; choices of no expert have row P."""
    E, N = sizes_E.shape[0], slot_TK.size
    num_tiles = -(-N // _ROWS) + E
    ends_E = jnp.cumsum(-(-sizes_E // _ROWS), dtype=jnp.int32)
    expert_t = jnp.minimum((jnp.arange(num_tiles)[:, None] >= ends_E).sum(1, dtype=jnp.int32), E - 1)
    # a row moves by as much as the tiles before its expert are longer than the rows before it
    shift_E = (ends_E - -(-sizes_E // _ROWS)) * _ROWS - (jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E)
    moved_TK = slot_TK + jnp.take(shift_E, ids_TK, mode="clip")
    P = num_tiles * _ROWS
    return Tiles(expert_t, ends_E[-1:]), jnp.where(slot_TK < N, moved_TK, P), P


@jax.custom_vjp
def _rows(x_PD: Array, a_ERD: Array, b_ERN: Array, gate_P1: Array, tiles: Tiles) -> Array:
    """gate (x A_e^T) B_e of every row, (P, N). Rows of no choice are zero if x is."""
    return _choose.run("pallas_tpu", {"pallas_tpu": _forward}, x_PD, a_ERD, b_ERN, gate_P1, tiles)


def _rows_forward(*operands):
    return _rows(*operands), operands


def _rows_backward(saved, dout_PN):
    dx_PD, da_ERD, db_ERN, dgate_P1 = _choose.run("pallas_tpu", {"pallas_tpu": _backward}, *saved, dout_PN)
    # an expert without a tile has not been written
    has_rows_E11 = (saved[-1].expert[:, None] == jnp.arange(len(da_ERD))).any(0)[:, None, None]
    gradient = lambda sum_ERX, weights: jnp.where(has_rows_E11, sum_ERX, 0).astype(weights.dtype)
    dgate_P1 = dgate_P1.astype(saved[3].dtype)
    return dx_PD, gradient(da_ERD, saved[1]), gradient(db_ERN, saved[2]), dgate_P1, Tiles(None, None)


_rows.defvjp(_rows_forward, _rows_backward)


def _call(kernel: Any, name: str, operands: tuple, specs: list, outs: list, products: int, interpret: bool) -> Any:
    x_PD, a_ERD, b_ERN, _, tiles, *_ = operands
    (_, R, D), N = a_ERD.shape, b_ERN.shape[2]
    varying, P = jax.typeof(x_PD).manual_axis_type, x_PD.shape[0]
    arrays = [operand for operand in operands if not isinstance(operand, Tiles)]
    flops = products * P * R * (D + N)
    moved = P * sum(a.shape[1] * a.dtype.itemsize for a in arrays if a.ndim == 2)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(P // _ROWS,), in_specs=specs, out_specs=[spec for spec, _, _ in outs]
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for _, shape, dtype in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_tpu_target.current().vmem_bytes - 8 * MIB
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=name,
    )(*tiles, *arrays)


def _tile(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((_ROWS, width), lambda i, expert, count: (i, 0))


def _own(R: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, R, width), lambda i, expert, count: (expert[i], 0, 0))


@functools.partial(jax.jit, static_argnames="interpret")
def _forward(x_PD, a_ERD, b_ERN, gate_P1, tiles, *, interpret=False):
    (_, R, D), (P, _), N = a_ERD.shape, x_PD.shape, b_ERN.shape[2]
    specs = [_tile(D), _own(R, D), _own(R, N), _tile(1)]
    outs = [(_tile(N), (P, N), x_PD.dtype)]
    operands = (x_PD, a_ERD, b_ERN, gate_P1.astype(jnp.float32), tiles)
    return _call(_forward_kernel, "low_rank_rows", operands, specs, outs, 2, interpret)[0]


@functools.partial(jax.jit, static_argnames="interpret")
def _backward(x_PD, a_ERD, b_ERN, gate_P1, tiles, dout_PN, *, interpret=False):
    (E, R, D), (P, _), N = a_ERD.shape, x_PD.shape, b_ERN.shape[2]
    specs = [_tile(D), _own(R, D), _own(R, N), _tile(1), _tile(N)]
    outs = [
        (_tile(D), (P, D), x_PD.dtype),
        (_own(R, D), (E, R, D), jnp.float32),
        (_own(R, N), (E, R, N), jnp.float32),
        (_tile(1), (P, 1), jnp.float32),
    ]
    operands = (x_PD, a_ERD, b_ERN, gate_P1.astype(jnp.float32), tiles, dout_PN.astype(x_PD.dtype))
    return _call(_backward_kernel, "low_rank_rows_backward", operands, specs, outs, 6, interpret)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward_kernel(expert, count, x, a, b, gate, out) -> None:
    live = pl.program_id(0) < count[0]

    @pl.when(live)
    def _():
        h_PR = _dot(x[...], a[0], 1, 1) * gate[...]
        out[...] = _dot(h_PR.astype(x.dtype), b[0], 1, 0).astype(out.dtype)

    # what is not read again may hold anything, but not what the gradient's sums could meet
    @pl.when(jnp.logical_not(live))
    def _():
        out[...] = jnp.zeros_like(out)


def _backward_kernel(expert, count, x, a, b, gate, dout, dx, da, db, dgate) -> None:
    i = pl.program_id(0)

    @pl.when((i == 0) | (expert[i] != expert[jnp.maximum(i - 1, 0)]))
    def _():
        da[...] = jnp.zeros_like(da)
        db[...] = jnp.zeros_like(db)

    live = i < count[0]

    @pl.when(live)
    def _():
        h_PR, dh_PR = _dot(x[...], a[0], 1, 1), _dot(dout[...], b[0], 1, 1)
        into_PR = (gate[...] * dh_PR).astype(x.dtype)
        dx[...] = _dot(into_PR, a[0], 1, 0).astype(dx.dtype)
        da[0] += _dot(into_PR, x[...], 0, 0)
        db[0] += _dot((gate[...] * h_PR).astype(x.dtype), dout[...], 0, 0)
        dgate[...] = jnp.sum(h_PR * dh_PR, axis=1, keepdims=True)

    @pl.when(jnp.logical_not(live))
    def _():
        dx[...] = jnp.zeros_like(dx)
        dgate[...] = jnp.zeros_like(dgate)


def _dot(left: Array, right: Array, i: int, j: int) -> Array:
    """Sums over a dim of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32, precision=precision)
