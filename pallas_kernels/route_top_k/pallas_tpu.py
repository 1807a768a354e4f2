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
_MOST_EXPERTS = 1024
#: Of VMEM: for a block of scores, and for each of what a second pass needs (all ids, a carry per k).
_BLOCK_BYTES, _SECOND_PASS_BYTES = 1 << 20, 4 << 20


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
    ids_bytes, carry_bytes = 4 * T * _round_up(settings.k, _SUBLANES), 4 * settings.k * E * _strip(E)
    if settings.priority == "choice" and settings.k > 1 and max(ids_bytes, carry_bytes) > _SECOND_PASS_BYTES:
        return (
            f'with priority "choice", T * k ids and k * E counts may take {_SECOND_PASS_BYTES >> 20} MiB of VMEM each'
        )
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
    block = strip * max(1, min(4, T // strip, _BLOCK_BYTES // (4 * E * strip)))
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
    """Earlier choices per expert (and k, if it decides); counts as a row; bias as a column; ids, all of them if needed.

    Ids are float32 here: vector units before v6e have no integer minimum.
    """
    E, K = static.E, static.settings.k
    scratch = [
        pltpu.VMEM((K if static.two_passes else 1, E, static.strip), jnp.float32),
        pltpu.VMEM((1, E), jnp.float32),
    ]
    if static.has_bias:
        scratch.append(pltpu.VMEM((E, static.strip), jnp.float32))
    strips = static.blocks * static.block // static.strip if static.two_passes else 1
    return [*scratch, pltpu.VMEM((strips, K, static.strip), jnp.float32)]


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
    carry, count_row, bias_column, ids = take(), take(), take(static.has_bias), take()
    phase, i = pl.program_id(0), pl.program_id(1)

    @pl.when((phase == 0) & (i == 0))
    def _():
        carry[...] = jnp.zeros_like(carry)
        count_row[...] = jnp.zeros_like(count_row)
        if bias is not None:
            bias_column[...] = _as_column(bias[...], static.strip)

    def for_each_strip(body: Any) -> None:
        strips = static.block // static.strip

        def step(s: Array, _: None) -> None:
            body(i * strips + s, pl.ds(pl.multiple_of(s * static.strip, static.strip), static.strip))

        jax.lax.fori_loop(0, strips, step, None)

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
            at = number if static.two_passes else 0
            taken_EW = _select(static, key_EW, scores_EW, live_1W, ids.at[at], gates.at[:, lanes])
            experts[:, lanes] = ids[at].astype(jnp.int32)
            count_row[...] += _row_counts(taken_EW)
            if static.two_passes:
                _for_each_k(static, lambda k, _: _add(carry, k, _ones_times(_hits(_row(ids.at[at], k), static.E))))
                return
            earlier_EW = carry[0] + _earlier(taken_EW)
            carry[0] += _ones_times(taken_EW)
            _for_each_k(static, lambda k, _: _place(ids.at[0], k, earlier_EW))
            positions[:, lanes] = ids[0].astype(jnp.int32)

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
            def place(k: Any, _: None) -> None:
                hit_EW = _hits(_row(ids.at[number], k), static.E)
                _place(ids.at[number], k, carry[k] + _earlier(hit_EW))
                _add(carry, k, _ones_times(hit_EW))

            _for_each_k(static, place)
            positions[:, lanes] = ids[number].astype(jnp.int32)

        for_each_strip(strip)


def _for_each_k(static: _Static, body: Any, carry: Any = None) -> Any:
    """carry = body(k, carry) for every k; unrolled for the usual few experts per token."""
    if static.settings.k > 8:
        return jax.lax.fori_loop(0, static.settings.k, body, carry)
    for k in range(static.settings.k):
        carry = body(k, carry)
    return carry


def _scores(logits_EW: Array, score_function: scoring.ScoreFunction) -> Array:
    if score_function == "sigmoid":
        return jax.nn.sigmoid(logits_EW)
    exp_EW = jnp.exp(logits_EW - jnp.max(logits_EW, axis=0, keepdims=True))
    return exp_EW / jnp.sum(exp_EW, axis=0, keepdims=True)


def _select(static: _Static, key_EW: Array, scores_EW: Array, live_1W: Array, ids: Any, gates: Any) -> Array:
    """Writes the ids and gates (K, W) of a strip; returns which experts its live tokens take."""
    settings, E = static.settings, static.E
    least = jnp.finfo(jnp.float32).min
    key_EW = jnp.where(jnp.isnan(key_EW), least, jnp.maximum(key_EW, least))
    expert_EW = _expert_iota(key_EW.shape)

    def choose(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_EW, total_1W = carry
        best_1W = jnp.max(key_EW, axis=0, keepdims=True)
        chosen_1W = jnp.min(jnp.where(key_EW == best_1W, expert_EW, float(E)), axis=0, keepdims=True)
        hit_EW = expert_EW == chosen_1W
        if static.has_bias:
            gate_1W = _sum_where(hit_EW, scores_EW)
        else:  # the key is the score, which is never negative
            gate_1W = jnp.where(best_1W == least, jnp.nan, best_1W)
        _put_row(ids, k, jnp.where(live_1W, chosen_1W, float(E)))
        _put_row(gates, k, gate_1W)
        return jnp.where(hit_EW, -jnp.inf, key_EW), total_1W + gate_1W

    key_EW, total_1W = _for_each_k(static, choose, (key_EW, jnp.zeros_like(key_EW[:1])))
    gates_KW = gates[...]
    if settings.renormalize:
        gates_KW = gates_KW / (total_1W + scoring.EPSILON)
    gates[...] = jnp.where(live_1W, gates_KW * settings.scale, 0.0)
    return (key_EW == -jnp.inf) & live_1W


def _place(ids: Any, k: Any, earlier_EW: Array) -> None:
    """Puts the position of choice k in the place of its id."""
    _put_row(ids, k, _sum_where(_hits(_row(ids, k), earlier_EW.shape[0]), earlier_EW))


def _row(rows: Any, k: Any) -> Array:
    """Row k. A traced k may lie anywhere within a sublane tile, which only a mask can address."""
    if isinstance(k, int):
        return rows[k : k + 1]
    return _sum_where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == k, rows[...])


def _put_row(rows: Any, k: Any, row_1W: Array) -> None:
    if isinstance(k, int):
        rows[k : k + 1] = row_1W
    else:
        rows[...] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == k, row_1W, rows[...])


def _add(carry: Any, k: Any, value_EW: Array) -> None:
    carry[k] += value_EW


def _lane_iota(width: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)


def _expert_iota(shape: tuple[int, int]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


def _hits(expert_1W: Array, E: int) -> Array:
    return _expert_iota((E, expert_1W.shape[1])) == expert_1W


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
