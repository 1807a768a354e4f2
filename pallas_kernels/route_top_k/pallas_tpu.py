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

from pallas_kernels.route_top_k import pallas_tpu_counting as counting
from pallas_kernels.route_top_k import scoring

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
    if T * settings.k > counting.MOST_CHOICES:
        return f"it counts at most {counting.MOST_CHOICES} choices"
    ids_bytes = 4 * T * counting.round_up(settings.k, counting.SUBLANES)
    carry_bytes = 4 * settings.k * E * counting.strip_lanes(E, T)
    if settings.priority == "choice" and settings.k > 1 and max(ids_bytes, carry_bytes) > _SECOND_PASS_BYTES:
        return (
            f'with priority "choice", T * k ids and k * E counts may take {_SECOND_PASS_BYTES >> 20} MiB of VMEM each'
        )
    return None


def route(
    logits_TE: Array,
    bias_E: Array | None,
    valid_T: Array | None,
    *,
    settings: scoring.Settings,
    interpret: bool = False,
) -> tuple:
    """(experts, gates, counts, positions, scores or None)."""
    (T, E), K = logits_TE.shape, settings.k
    strip = counting.strip_lanes(E, T)
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
    """Earlier choices per expert (and k, if it decides), counts, bias, ids (all if needed): as _Refs has them."""
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


@dataclasses.dataclass(frozen=True)
class _Refs:
    """Operands, results and scratch. None: not there."""

    logits: Any
    bias: Any
    valid: Any
    experts: Any
    gates: Any
    counts: Any
    positions: Any
    scores: Any
    carry: Any
    count_row: Any
    bias_column: Any
    ids: Any


def _kernel(static: _Static, *refs: Any) -> None:
    present = {
        "bias": static.has_bias,
        "valid": static.has_valid,
        "scores": static.settings.return_scores,
        "bias_column": static.has_bias,
    }
    refs, names = iter(refs), [field.name for field in dataclasses.fields(_Refs)]
    r = _Refs(**{name: next(refs) if present.get(name, True) else None for name in names})
    phase, i = pl.program_id(0), pl.program_id(1)
    for_each_strip = functools.partial(counting.for_each_strip, static.block, static.strip)

    @pl.when((phase == 0) & (i == 0))
    def _():
        r.carry[...] = jnp.zeros_like(r.carry)
        r.count_row[...] = jnp.zeros_like(r.count_row)
        if static.has_bias:
            r.bias_column[...] = _as_column(r.bias[...], static.strip)

    strips = static.block // static.strip

    @pl.when(phase == 0)
    def _():
        for_each_strip(lambda s, lanes: _first_pass(static, r, i * strips + s, lanes))

    r.counts[...] = r.count_row[...].astype(jnp.int32)
    if not static.two_passes:
        return

    @pl.when((phase == 1) & (i == 0))
    def _():
        before_EW = jnp.zeros_like(r.carry[0])
        for k in range(static.settings.k):
            r.carry[k], before_EW = before_EW, before_EW + r.carry[k]

    @pl.when(phase == 1)
    def _():
        for_each_strip(lambda s, lanes: _second_pass(static, r, i * strips + s, lanes))


def _first_pass(static: _Static, r: _Refs, number: Array, lanes: Any) -> None:
    """Everything of a strip, but for positions if they need a second pass."""
    scores_EW = _scores(r.logits[:, lanes].astype(jnp.float32), static.settings.score_function)
    if static.settings.return_scores:
        r.scores[:, lanes] = scores_EW
    lane_1W = jax.lax.broadcasted_iota(jnp.int32, (1, static.strip), 1)
    live_1W = number * static.strip + lane_1W < static.T
    if static.has_valid:
        live_1W &= r.valid[:, lanes] != 0
    key_EW = scores_EW + r.bias_column[...] if static.has_bias else scores_EW
    ids = r.ids.at[number if static.two_passes else 0]
    taken_EW = _select(static, key_EW, scores_EW, live_1W, ids, r.gates.at[:, lanes])
    r.experts[:, lanes] = ids[...].astype(jnp.int32)
    r.count_row[...] += counting.total_as_row(taken_EW)

    def count(k: Any, _: None) -> None:
        r.carry[k] += counting.total(counting.hits(counting.row(ids, k), static.E))

    if static.two_passes:
        counting.for_each_k(static.settings.k, count)
        return
    earlier_EW = r.carry[0] + counting.earlier(taken_EW)
    r.carry[0] += counting.total(taken_EW)
    counting.for_each_k(static.settings.k, lambda k, _: _place(ids, k, earlier_EW))
    r.positions[:, lanes] = ids[...].astype(jnp.int32)


def _second_pass(static: _Static, r: _Refs, number: Array, lanes: Any) -> None:
    """The positions of a strip, now that `carry` begins with the choices of lower k."""
    ids = r.ids.at[number]

    def place(k: Any, _: None) -> None:
        hit_EW = counting.hits(counting.row(ids, k), static.E)
        _place(ids, k, r.carry[k] + counting.earlier(hit_EW))
        r.carry[k] += counting.total(hit_EW)

    counting.for_each_k(static.settings.k, place)
    r.positions[:, lanes] = ids[...].astype(jnp.int32)


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
    expert_EW = counting.expert_iota(key_EW.shape)

    def choose(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_EW, total_1W = carry
        best_1W = jnp.max(key_EW, axis=0, keepdims=True)
        chosen_1W = jnp.min(jnp.where(key_EW == best_1W, expert_EW, float(E)), axis=0, keepdims=True)
        hit_EW = expert_EW == chosen_1W
        if static.has_bias:
            gate_1W = counting.sum_where(hit_EW, scores_EW)
        else:  # the key is the score, which is never negative
            gate_1W = jnp.where(best_1W == least, jnp.nan, best_1W)
        counting.put_row(ids, k, jnp.where(live_1W, chosen_1W, float(E)))
        counting.put_row(gates, k, gate_1W)
        return jnp.where(hit_EW, -jnp.inf, key_EW), total_1W + gate_1W

    key_EW, total_1W = counting.for_each_k(settings.k, choose, (key_EW, jnp.zeros_like(key_EW[:1])))
    gates_KW = gates[...]
    if settings.renormalize:
        gates_KW = gates_KW / (total_1W + scoring.EPSILON)
    gates[...] = jnp.where(live_1W, gates_KW * settings.scale, 0.0)
    return (key_EW == -jnp.inf) & live_1W


def _place(ids: Any, k: Any, earlier_EW: Array) -> None:
    """Puts the position of choice k in the place of its id."""
    hit_EW = counting.hits(counting.row(ids, k), earlier_EW.shape[0])
    counting.put_row(ids, k, counting.sum_where(hit_EW, earlier_EW))


def _as_column(row_1E: Array, width: int) -> Array:
    E = row_1E.shape[1]
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (E, E))
    column_E1 = jnp.sum(jnp.where(at(0) == at(1), row_1E, 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(column_E1, (E, width))
