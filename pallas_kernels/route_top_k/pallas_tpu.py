"""Scores, top-k, counts and positions in one Pallas TPU kernel, without a sort.

Dims as in api.py. Everything lies with tokens along lanes and experts along sublanes: the maximum over experts is then
elementwise work but for three steps, and arrays of K rows are stored without padding. Transposed operands and results
cost nothing where XLA may choose the layout of their producers and consumers.

Tokens pass in grid steps of `block` and, within one, in strips of `strip`. K times, the largest score of each token is
taken and struck out. What has been struck out, as 0 and 1, times a triangular matrix of ones is the number of earlier
choices of each expert within the strip; a carry adds those of earlier strips. Grid steps run in order.

With priority "choice" the first choices of all tokens come before any second one: the totals must be known first, so a
second pass of the grid over the ids, which stay in VMEM, makes the positions.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.route_top_k import scoring

_LANES, _SUBLANES = 128, 8
#: Positions are exact sums in float32 up to here.
_MOST_CHOICES = 1 << 24
_VMEM_FOR_IDS = 4 << 20
_MOST_EXPERTS = 2048


@dataclasses.dataclass(frozen=True)
class _Static:
    settings: scoring.Settings
    T: int
    E: int
    block: int
    strip: int
    has_bias: bool
    has_valid: bool

    @property
    def two_passes(self) -> bool:
        return self.settings.priority == "choice" and self.settings.k > 1

    @property
    def blocks(self) -> int:
        return -(-self.T // self.block)


def refusal(shape: tuple[int, int], dtype: Any, settings: scoring.Settings) -> str | None:
    """Why the kernel cannot run this; None if it can."""
    T, E = shape
    if jnp.dtype(dtype).itemsize > 4:
        return "it computes in float32"
    if T == 0:
        return "there is no token"
    if E > _MOST_EXPERTS:
        return f"it holds the scores of at most {_MOST_EXPERTS} experts at once"
    if T * settings.k > _MOST_CHOICES:
        return f"it counts at most {_MOST_CHOICES} choices"
    ids_bytes = 4 * T * _round_up(settings.k, _SUBLANES)
    if settings.priority == "choice" and settings.k > 1 and ids_bytes > _VMEM_FOR_IDS:
        return f'with priority "choice" its ids must fit into {_VMEM_FOR_IDS >> 20} MiB of VMEM'
    return None


def route(logits_TE: Array, bias_E: Array | None, valid_T: Array | None, *, settings: scoring.Settings) -> tuple:
    """(experts, gates, counts, positions, scores or None)."""
    return _call(logits_TE, bias_E, valid_T, settings, interpret=False)


def route_interpreted(
    logits_TE: Array, bias_E: Array | None, valid_T: Array | None, *, settings: scoring.Settings
) -> tuple:
    """The same by Pallas's interpreter, on any platform."""
    return _call(logits_TE, bias_E, valid_T, settings, interpret=pltpu.InterpretParams())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _strip(E: int) -> int:
    """Lanes per strip: as many as leave the scores of all experts in half the vector registers."""
    lanes = (1 << 15) // _round_up(E, _SUBLANES) // _LANES * _LANES
    return max(_LANES, min(4 * _LANES, lanes))


def _call(logits_TE: Array, bias_E: Array | None, valid_T: Array | None, settings: scoring.Settings, interpret: Any):
    (T, E), K = logits_TE.shape, settings.k
    strip = min(_strip(E), _round_up(T, _LANES))
    block = strip * max(1, min(4, T // strip))
    static = _Static(settings, T, E, block, strip, bias_E is not None, valid_T is not None)
    n = static.blocks
    # in a second pass, blocks of the first stay where they are
    first_pass = lambda p, i: (0, jnp.where(p == 0, i, n - 1))
    last_pass = (lambda p, i: (0, jnp.where(p == 0, 0, i))) if static.two_passes else first_pass
    row = lambda rows, index: pl.BlockSpec((rows, block), index)
    once = pl.BlockSpec((1, E), lambda p, i: (0, 0))
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits_TE).manual_axis_type)

    operands, in_specs = [logits_TE.T], [row(E, first_pass)]
    if bias_E is not None:
        operands, in_specs = [*operands, bias_E.astype(jnp.float32)[None]], [*in_specs, once]
    if valid_T is not None:
        operands, in_specs = [*operands, valid_T.astype(jnp.int32)[None]], [*in_specs, row(1, first_pass)]
    out_shape = [like((K, T), jnp.int32), like((K, T), jnp.float32), like((1, E), jnp.int32), like((K, T), jnp.int32)]
    out_specs = [row(K, first_pass), row(K, first_pass), once, row(K, last_pass)]
    if settings.return_scores:
        out_shape, out_specs = [*out_shape, like((E, T), jnp.float32)], [*out_specs, row(E, first_pass)]

    experts, gates, counts, positions, *scores = pl.pallas_call(
        functools.partial(_kernel, static),
        grid=(2 if static.two_passes else 1, n),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=_scratch(static),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=_cost(static, logits_TE.dtype.itemsize),
        interpret=interpret,
        name="route_top_k",
    )(*operands)
    return experts.T, gates.T, counts[0], positions.T, scores[0].T if scores else None


def _scratch(static: _Static) -> list:
    """carry: earlier choices per expert (and k, where k decides); counts of the row form; bias as a column; ids."""
    E, K = static.E, static.settings.k
    scratch = [
        pltpu.VMEM((K if static.two_passes else 1, E, static.strip), jnp.float32),
        pltpu.VMEM((1, E), jnp.float32),
    ]
    if static.has_bias:
        scratch.append(pltpu.VMEM((E, static.strip), jnp.float32))
    if static.two_passes:
        scratch.append(pltpu.VMEM((static.blocks * static.block // static.strip, K, static.strip), jnp.int32))
    return scratch


def _cost(static: _Static, logit_bytes: int) -> pl.CostEstimate:
    T, E, K = static.T, static.E, static.settings.k
    return pl.CostEstimate(
        flops=T * E * (10 + 8 * K),
        transcendentals=T * E,
        bytes_accessed=T * (E * (logit_bytes + 4 * static.settings.return_scores) + 12 * K) + 4 * E,
    )


# --- the kernel ------------------------------------------------------------------------------------------------------


def _kernel(static: _Static, *refs: Any) -> None:
    refs = iter(refs)
    take = lambda present=True: next(refs) if present else None
    logits, bias, valid = take(), take(static.has_bias), take(static.has_valid)
    experts, gates, counts, positions, scores = take(), take(), take(), take(), take(static.settings.return_scores)
    carry, count_row, bias_column, ids = take(), take(), take(static.has_bias), take(static.two_passes)
    phase, i = pl.program_id(0), pl.program_id(1)

    @pl.when((phase == 0) & (i == 0))
    def _():
        carry[...] = jnp.zeros_like(carry)
        count_row[...] = jnp.zeros_like(count_row)
        if bias is not None:
            bias_column[...] = _as_column(bias[...], static.strip)

    def for_each_strip(body: Any) -> None:
        def step(s: Array, nothing: None) -> None:
            body(i * (static.block // static.strip) + s, pl.ds(pl.multiple_of(s * static.strip, static.strip), static.strip))

        jax.lax.fori_loop(0, static.block // static.strip, step, None)

    @pl.when(phase == 0)
    def _():
        def strip(number: Array, lanes: Any) -> None:
            scores_EW = _scores(logits[:, lanes].astype(jnp.float32), static.settings.score_function)
            if scores is not None:
                scores[:, lanes] = scores_EW
            live_1W = number * static.strip + _lane_iota(static.strip) < static.T
            if valid is not None:
                live_1W &= valid[:, lanes] != 0
            key_EW = scores_EW if bias is None else scores_EW + bias_column[...]
            taken_EW = _select(static, key_EW, scores_EW, live_1W, experts, gates, lanes)
            count_row[...] += _row_counts(taken_EW)
            if static.two_passes:
                ids[number] = experts[:, lanes]
                for_each_k(static, lambda k: _add(carry, k, _ones_times(_hits(ids[number, pl.ds(k, 1)], static.E))))
            else:
                earlier_EW = carry[0] + _earlier(taken_EW)
                carry[0] += _ones_times(taken_EW)
                for_each_k(static, lambda k: _place(positions, experts, k, lanes, earlier_EW))

        for_each_strip(strip)

    counts[...] = count_row[...].astype(jnp.int32)
    if not static.two_passes:
        return

    @pl.when((phase == 1) & (i == 0))
    def _():
        before_EW = jnp.zeros_like(carry[0])
        for k in range(static.settings.k):
            total_EW = carry[k]
            carry[k] = before_EW
            before_EW = before_EW + total_EW

    @pl.when(phase == 1)
    def _():
        def strip(number: Array, lanes: Any) -> None:
            def place(k: Array) -> None:
                expert_1W = ids[number, pl.ds(k, 1)]
                hit_EW = _hits(expert_1W, static.E)
                position_1W = _sum_where(hit_EW, carry[k] + _earlier(hit_EW))
                positions[pl.ds(k, 1), lanes] = position_1W.astype(jnp.int32)
                _add(carry, k, _ones_times(hit_EW))

            for_each_k(static, place)

        for_each_strip(strip)


def for_each_k(static: _Static, body: Any) -> None:
    """Unrolled for the usual few experts per token."""
    if static.settings.k <= 8:
        for k in range(static.settings.k):
            body(k)
    else:
        jax.lax.fori_loop(0, static.settings.k, lambda k, nothing: body(k), None)


def _scores(logits_EW: Array, score_function: scoring.ScoreFunction) -> Array:
    if score_function == "sigmoid":
        return jax.nn.sigmoid(logits_EW)
    exp_EW = jnp.exp(logits_EW - jnp.max(logits_EW, axis=0, keepdims=True))
    return exp_EW / jnp.sum(exp_EW, axis=0, keepdims=True)


def _select(static: _Static, key_EW, scores_EW, live_1W, experts, gates, lanes) -> Array:
    """Writes the ids and gates of a strip; returns which experts its live tokens take."""
    settings, E = static.settings, static.E
    least = jnp.finfo(jnp.float32).min
    key_EW = jnp.where(jnp.isnan(key_EW), least, jnp.maximum(key_EW, least))
    expert_EW = jax.lax.broadcasted_iota(jnp.int32, key_EW.shape, 0)

    def choose(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_EW, total_1W = carry
        best_1W = jnp.max(key_EW, axis=0, keepdims=True)
        chosen_1W = jnp.min(jnp.where(key_EW == best_1W, expert_EW, E), axis=0, keepdims=True)
        hit_EW = expert_EW == chosen_1W
        gate_1W = _sum_where(hit_EW, scores_EW)
        experts[pl.ds(k, 1), lanes] = jnp.where(live_1W, chosen_1W, E)
        gates[pl.ds(k, 1), lanes] = gate_1W
        return jnp.where(hit_EW, -jnp.inf, key_EW), total_1W + gate_1W

    carry = key_EW, jnp.zeros_like(key_EW[:1])
    if settings.k <= 8:
        for k in range(settings.k):
            carry = choose(k, carry)
    else:
        carry = jax.lax.fori_loop(0, settings.k, choose, carry)
    key_EW, total_1W = carry
    gates_KW = gates[:, lanes]
    if settings.renormalize:
        gates_KW = gates_KW / (total_1W + scoring.EPSILON)
    gates[:, lanes] = jnp.where(live_1W, gates_KW * settings.scale, 0.0)
    return (key_EW == -jnp.inf) & live_1W


def _place(positions, experts, k, lanes, earlier_EW) -> None:
    hit_EW = _hits(experts[pl.ds(k, 1), lanes], earlier_EW.shape[0])
    positions[pl.ds(k, 1), lanes] = _sum_where(hit_EW, earlier_EW).astype(jnp.int32)


def _add(carry, k, value_EW) -> None:
    carry[k] += value_EW


def _lane_iota(width: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)


def _hits(expert_1W: Array, E: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (E, expert_1W.shape[1]), 0) == expert_1W


def _sum_where(hit_EW: Array, value_EW: Array) -> Array:
    return jnp.sum(jnp.where(hit_EW, value_EW, 0.0), axis=0, keepdims=True)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Of zeros and ones in bfloat16: exact in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _zeros_and_ones(hit: Array) -> Array:
    return hit.astype(jnp.float32).astype(jnp.bfloat16)


def _earlier(hit_EW: Array) -> Array:
    """How many lanes before each one are hit."""
    W = hit_EW.shape[1]
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (W, W))
    return _dot(_zeros_and_ones(hit_EW), _zeros_and_ones(at(0) < at(1)), (1, 0))


def _ones_times(hit_EW: Array) -> Array:
    """How many lanes are hit, in every lane."""
    W = hit_EW.shape[1]
    return _dot(_zeros_and_ones(hit_EW), jnp.ones((W, W), jnp.bfloat16), (1, 0))


def _row_counts(hit_EW: Array) -> Array:
    """How many lanes are hit, experts along lanes."""
    return _dot(jnp.ones((1, hit_EW.shape[1]), jnp.bfloat16), _zeros_and_ones(hit_EW), (1, 1))


def _as_column(row_1E: Array, width: int) -> Array:
    E = row_1E.shape[1]
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (E, E))
    column_E1 = jnp.sum(jnp.where(at(0) == at(1), row_1E, 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(column_E1, (E, width))
