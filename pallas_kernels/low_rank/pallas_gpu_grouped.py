"""The grouped low-rank product as Pallas GPU kernels (Triton), on rows that are sorted by expert.

A program has some rows of one expert (_gpu_schedule) and walks twice: over D to their R numbers, which stay in
registers, and over N from them to the result. Backward it does both again the other way round, and writes what the
gradients of the factors are made of, R numbers per row on each side; those are _gpu_weights'. Rows are gathered from
their tokens in the loads, and a kernel of permute adds up each token's.

Dims as in api.py; M = T K rows, W rows of a program, P ranks filled up to a power of two, C columns of a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import _choose, _gpu_schedule, _gpu_target, _gpu_tiles, _gpu_weights
from pallas_kernels._gpu_rows import dot, load_tile
from pallas_kernels.grouped_matmul import pallas_gpu as grouped_matmul
from pallas_kernels.low_rank import xla
from pallas_kernels.permute import pallas_gpu as permute_gpu
from pallas_kernels.permute import xla as permute
from pallas_kernels.route_top_k import expert_rows

Ref = Any
_MOST_ROWS, _MOST_RANKS, _COLS, _WARPS, _STAGES = 64, 128, 64, 4, 3


def refusal(x_TD: Array, a_ERD: Array, b_ERN: Array) -> str | None:
    """Why the kernels cannot take these operands; None if they can."""
    if a_ERD.shape[1] > _MOST_RANKS:
        return f"the kernel holds at most {_MOST_RANKS} ranks of an expert, not {a_ERD.shape[1]}"
    return grouped_matmul.why_not(x_TD, a_ERD, b_ERN, num_groups=len(a_ERD), asked="pallas_gpu")


def grouped(x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TK: Array, ids_TK: Array, onto_TN: Array | None) -> Array:
    """out (T, N), a token's own experts alone."""
    sizes_E, slot_TK = expert_rows(ids_TK, len(a_ERD))
    out_TN = _product(x_TD, a_ERD, b_ERN, gates_TK, Plan(sizes_E, slot_TK, xla.choices(slot_TK, ids_TK.size)))
    return out_TN if onto_TN is None else onto_TN + out_TN


class Plan(NamedTuple):
    """Rows of each expert; the row of each choice, M: none; the choice t * K + k of each row, M: none."""

    sizes_E: Array
    slot_TK: Array
    choice_M: Array

    @property
    def token_M(self) -> Array:
        """T: none."""
        return self.choice_M // self.slot_TK.shape[1]


@jax.custom_vjp
def _product(x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TK: Array, plan: Plan) -> Array:
    return _choose.run("pallas_gpu", {"pallas_gpu": _forward}, x_TD, a_ERD, b_ERN, gates_TK, plan)


def _product_forward(*operands):
    return _product(*operands), operands


def _product_backward(saved, dout_TN):
    gradients = _choose.run("pallas_gpu", {"pallas_gpu": _backward}, *saved, dout_TN)
    return *gradients, Plan(None, None, None)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.jit, static_argnames="interpret")
def _forward(x_TD, a_ERD, b_ERN, gates_TK, plan, *, interpret=False):
    outs = [((plan.choice_M.shape[0], b_ERN.shape[2]), x_TD.dtype)]
    operands = (x_TD, a_ERD, b_ERN, permute.take(gates_TK.reshape(-1), plan.choice_M), plan)
    (y_MN,) = _call(_forward_kernel, "low_rank_rows", outs, operands, interpret)
    return permute_gpu.sum_choices(y_MN, plan.slot_TK, None, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _backward(x_TD, a_ERD, b_ERN, gates_TK, plan, dout_TN, *, interpret=False):
    """(dx, da, db, dgates)."""
    M, (E, R, D), dtype = plan.choice_M.shape[0], a_ERD.shape, x_TD.dtype
    outs = [((M, D), dtype), ((M, R), dtype), ((M, R), dtype), ((M,), jnp.float32)]
    operands = (x_TD, a_ERD, b_ERN, permute.take(gates_TK.reshape(-1), plan.choice_M), plan, dout_TN)
    dx_MD, into_MR, h_MR, dgate_M = _call(_backward_kernel, "low_rank_rows_backward", outs, operands, interpret)
    target = _gpu_target.current() or _gpu_target.SMALLEST

    def gradient(left_MR: Array, right_TX: Array) -> Array:
        tiles = _gpu_tiles.weight_tiles(M, R, right_TX.shape[1], E, dtype.itemsize, target, gathers=True)
        how = dict(num_groups=E, tiles=tiles, right_index_M=plan.token_M, interpret=interpret)
        return _gpu_weights.weight_gradient(left_MR, right_TX, plan.sizes_E, None, **how)

    dx_TD = permute_gpu.sum_choices(dx_MD, plan.slot_TK, None, interpret=interpret)
    dgates_TK = permute.take(dgate_M, plan.slot_TK).astype(gates_TK.dtype)
    return dx_TD, gradient(into_MR, x_TD), gradient(h_MR, dout_TN), dgates_TK


def _call(kernel: Callable[..., None], name: str, outs: list, operands: tuple[Any, ...], interpret: bool) -> Any:
    x_TD, a_ERD, b_ERN, gate_M, plan, *dout_TN = operands
    M, E = plan.choice_M.shape[0], len(a_ERD)
    rows = min(max(1 << max((M // (2 * E)).bit_length() - 1, 0), _gpu_tiles.LEAST), _MOST_ROWS)
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x_TD).manual_axis_type)
    return pl.pallas_call(
        functools.partial(kernel, rows),
        out_shape=[like(shape, dtype) for shape, dtype in outs],
        grid=(_gpu_schedule.num_row_tiles(M, E, rows),),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name=name,
    )(x_TD, a_ERD, b_ERN, gate_M.astype(jnp.float32), plan.sizes_E, plan.token_M, *dout_TN)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward_kernel(rows: int, x, a, b, gate, sizes, token, out) -> None:
    t = _Tile(rows, x, a, gate, sizes, token)
    h_WP = t.to_ranks(x, a) * t.gate_W[:, None]
    t.from_ranks(h_WP.astype(x.dtype), b, out)


def _backward_kernel(rows: int, x, a, b, gate, sizes, token, dout, dx, into, h, dgate) -> None:
    """into, h: the gated R numbers of the gradient and of the row."""
    t = _Tile(rows, x, a, gate, sizes, token)
    h_WP, dh_WP = t.to_ranks(x, a), t.to_ranks(dout, b)
    into_WP = (dh_WP * t.gate_W[:, None]).astype(x.dtype)
    t.from_ranks(into_WP, a, dx)
    at, mask = (t.row_W[:, None], t.rank_P[None, :]), t.mine_W[:, None] & (t.rank_P < a.shape[1])[None, :]
    plgpu.store(into.at[at], into_WP, mask=mask)
    plgpu.store(h.at[at], (h_WP * t.gate_W[:, None]).astype(x.dtype), mask=mask)
    plgpu.store(dgate.at[t.row_W], jnp.sum(h_WP * dh_WP, axis=1), mask=t.mine_W)


class _Tile:
    """The rows of a program, with their tokens, gates and expert's ranks; those of no expert have zeros for ranks."""

    def __init__(self, rows: int, x: Ref, a: Ref, gate: Ref, sizes: Ref, token: Ref):
        (T, _), (E, self.R, _), (M,) = x.shape, a.shape, gate.shape
        how = dict(num_rows=M, num_groups=E, held_groups=E, rows=rows)
        self.at = _gpu_schedule.row_tile(sizes, jnp.int32(0), pl.program_id(0), **how)
        self.row_W = self.at.row + _iota(rows)
        self.mine_W = self.row_W < self.at.end
        # of the rows of others any token will do: what comes of them is not stored
        self.token_W = jnp.minimum(plgpu.load(token.at[jnp.minimum(self.row_W, M - 1)]), T - 1)
        self.rank_P = _iota(max(1 << (self.R - 1).bit_length(), _gpu_tiles.LEAST))
        self.gate_W = plgpu.load(gate.at[self.row_W], mask=self.mine_W & self.at.held, other=0)

    def _factor(self, factor: Ref, col_C: Array, live_C: Array | None) -> Array:
        """Some columns of the expert's (P, C)."""
        rank_P = self.rank_P if self.R == self.rank_P.shape[0] else jnp.minimum(self.rank_P, self.R - 1)
        real_P1 = None if self.R == self.rank_P.shape[0] else (self.rank_P < self.R)[:, None]
        return load_tile(factor, (self.at.group,), rank_P, col_C, real_P1, None if live_C is None else live_C[None, :])

    def to_ranks(self, wide: Ref, factor: Ref) -> Array:
        """wide @ factor.T, (W, P) in float32, of the rows' tokens."""

        def step(i: Array, sum_WP: Array) -> Array:
            col_C, live_C = _columns(i, wide.shape[1])
            wide_WC = load_tile(wide, (), self.token_W, col_C, None if live_C is None else live_C[None, :])
            return sum_WP + dot(wide_WC, self._factor(factor, col_C, live_C), (1, 1))

        steps = self.at.held.astype(jnp.int32) * -(-wide.shape[1] // _COLS)
        return jax.lax.fori_loop(0, steps, step, jnp.zeros((*self.row_W.shape, *self.rank_P.shape), jnp.float32))

    def from_ranks(self, h_WP: Array, factor: Ref, out: Ref) -> None:
        """out = h @ factor, the rows of this tile."""

        def step(i: Array, _: None) -> None:
            col_C, live_C = _columns(i, out.shape[1])
            out_WC = dot(h_WP, self._factor(factor, col_C, live_C), (1, 0)).astype(out.dtype)
            mask_WC = jnp.broadcast_to(self.mine_W[:, None], out_WC.shape)
            mask_WC = mask_WC if live_C is None else mask_WC & live_C[None, :]
            at = out.at[self.row_W[:, None], (i * _COLS + _iota(_COLS))[None, :]]
            plgpu.store(at, out_WC, mask=mask_WC)

        jax.lax.fori_loop(0, -(-out.shape[1] // _COLS), step, None)


def _columns(i: Array, width: int) -> tuple[Array, Array | None]:
    """(columns of a step, which of them there are or None for all); beyond the last it is the last."""
    col_C = i * _COLS + _iota(_COLS)
    return (col_C, None) if width % _COLS == 0 else (jnp.minimum(col_C, width - 1), col_C < width)


def _iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
