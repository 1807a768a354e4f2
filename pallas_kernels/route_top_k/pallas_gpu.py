"""Routing as a Pallas GPU kernel (Triton): scores, top-k, gates, and each choice's place within a block of tokens.

One launch reads the logits once. What blocks before it chose follows from the counts of the blocks, a small array that
XLA sums up and adds. A block's scores lie in registers, the best expert is taken K times. Dims as in api.py; W tokens
of a block, P experts filled up to a power of two, Q choices likewise.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_target
from pallas_kernels.route_top_k import scoring, xla

Ref = Any
MOST_EXPERTS = 4096
#: Scores of a block, 16 for each of its threads: with more, several copies of them fill all registers.
BLOCK_SCORES = 2048
_WARPS = 4


def refusal(shape: tuple[int, int], dtype: Any, asked: str | None) -> str | None:
    """Why the kernel cannot run this; None if it can."""
    if jnp.dtype(dtype).itemsize > 4:
        return "it computes in float32"
    if shape[0] == 0:
        return "there is no token"
    if shape[1] > MOST_EXPERTS:
        return f"it holds the scores of at most {MOST_EXPERTS} experts at once"
    if asked is None and _gpu_target.current() is None:
        return "this is not traced for an NVIDIA GPU"
    return None


@dataclasses.dataclass(frozen=True)
class _Static:
    settings: scoring.Settings
    T: int
    E: int
    block: int
    with_places: bool


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
    block = min(max(BLOCK_SCORES // power_above(E), 1), 64)
    static = _Static(settings, T, E, block, settings.priority == "token" or K == 1)
    B = -(-T // block)
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits_TE).manual_axis_type)
    given = {"logits": logits_TE, "bias": bias_E, "valid": None if valid_T is None else valid_T.astype(jnp.int32)}
    out = {"experts": like((T, K), jnp.int32), "gates": like((T, K), jnp.float32)}
    if static.with_places:
        out |= {"places": like((T, K), jnp.int32), "counts": like((B, E), jnp.int32)}
    if settings.return_scores:
        out["scores"] = like((T, E), jnp.float32)
    operands, tree = jax.tree.flatten(given)
    shapes, out_tree = jax.tree.flatten(out)
    results = pl.pallas_call(
        functools.partial(_kernel, static, tree, out_tree),
        out_shape=shapes,
        grid=(B,),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="route_top_k",
    )(*operands)
    r = jax.tree.unflatten(out_tree, results)
    if static.with_places:
        counts_E, positions_TK = _positions(r["experts"], r["places"], r["counts"], block)
    else:
        counts_E, positions_TK = xla.positions(r["experts"], num_experts=E, priority=settings.priority)
    return r["experts"], r["gates"], counts_E, positions_TK, r.get("scores")


def _positions(experts_TK: Array, places_TK: Array, counts_BE: Array, block: int) -> tuple[Array, Array]:
    """(counts, positions), from the places within blocks and what each block holds."""
    T, K = experts_TK.shape
    B, E = counts_BE.shape
    ends_BE = jnp.cumsum(counts_BE, axis=0, dtype=jnp.int32)
    starts_BE = ends_BE - counts_BE
    block_T1 = jax.lax.broadcasted_iota(jnp.int32, (T, 1), 0) // block
    before_TK = starts_BE[block_T1, jnp.minimum(experts_TK, E - 1)]
    return ends_BE[-1], jnp.where(experts_TK < E, places_TK + before_TK, 0)


# --- the kernel ------------------------------------------------------------------------------------------------------


def _kernel(static: _Static, tree: Any, out_tree: Any, *refs: Ref) -> None:
    given, out = (
        jax.tree.unflatten(tree, refs[: tree.num_leaves]),
        jax.tree.unflatten(out_tree, refs[tree.num_leaves :]),
    )
    settings, (W, P), E = static.settings, (static.block, power_above(static.E)), static.E
    token_W = pl.program_id(0) * W + _iota(W)
    expert_P, live_W1 = _iota(P), (token_W < static.T)[:, None]
    # beyond the last token or expert: any of them, masked
    row_W1, there_P = jnp.minimum(token_W, static.T - 1)[:, None], expert_P < E
    at = (row_W1, jnp.minimum(expert_P, E - 1)[None, :])
    logits_WP = plgpu.load(given["logits"].at[at]).astype(jnp.float32)
    scores_WP = _scores(logits_WP, there_P, settings.score_function)
    if settings.return_scores:
        plgpu.store(out["scores"].at[token_W[:, None], expert_P[None, :]], scores_WP, mask=live_W1 & there_P[None, :])
    bias_P = None
    if given["bias"] is not None:
        bias_P = plgpu.load(given["bias"].at[jnp.minimum(expert_P, E - 1)]).astype(jnp.float32)[None, :]
    if given["valid"] is not None:
        live_W1 &= (plgpu.load(given["valid"].at[jnp.minimum(token_W, static.T - 1)]) != 0)[:, None]
    key_WP = jnp.where(there_P, scoring.selection_key(scores_WP, bias_P), -jnp.inf)
    chosen_WQ, gates_WQ, taken_WP = _select(static, key_WP, scores_WP, live_W1)
    choice_Q = _iota(chosen_WQ.shape[1])
    to = (token_W[:, None], choice_Q[None, :])
    mask_WQ = (token_W < static.T)[:, None] & (choice_Q < settings.k)[None, :]
    plgpu.store(out["experts"].at[to], chosen_WQ, mask=mask_WQ)
    plgpu.store(out["gates"].at[to], gates_WQ, mask=mask_WQ)
    if static.with_places:
        taken_WP = taken_WP.astype(jnp.int32)
        places_WQ = _pick(chosen_WQ, jax.lax.cumsum(taken_WP, axis=0) - taken_WP, settings.k)
        plgpu.store(out["places"].at[to], places_WQ, mask=mask_WQ)
        counts_P = jnp.sum(taken_WP, axis=0, dtype=jnp.int32)
        plgpu.store(out["counts"].at[jnp.broadcast_to(pl.program_id(0), (P,)), expert_P], counts_P, mask=there_P)


def _scores(logits_WP: Array, there_P: Array, score_function: scoring.ScoreFunction) -> Array:
    """0 beyond the last expert."""
    if score_function == "sigmoid":
        return jnp.where(there_P, jax.nn.sigmoid(logits_WP), 0.0)
    exp_WP = jnp.exp(logits_WP - jnp.max(logits_WP, axis=1, keepdims=True))  # experts beyond the last repeat it
    exp_WP = jnp.where(there_P, exp_WP, 0.0)
    return exp_WP / jnp.sum(exp_WP, axis=1, keepdims=True)


def _select(static: _Static, key_WP: Array, scores_WP: Array, live_W1: Array) -> tuple[Array, Array, Array]:
    """(ids, gates) (W, Q), and which experts the live tokens take."""
    settings, (W, P) = static.settings, key_WP.shape
    Q = power_above(settings.k)
    expert_WP, choice_WQ = (jax.lax.broadcasted_iota(jnp.int32, (W, n), 1) for n in (P, Q))

    def choose(k: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        key_WP, chosen_WQ, gates_WQ = carry
        best_W1 = jnp.max(key_WP, axis=1, keepdims=True)
        chosen_W1 = jnp.min(jnp.where(key_WP == best_W1, expert_WP, P), axis=1, keepdims=True)
        hit_WP = expert_WP == chosen_W1
        gate_W1 = jnp.sum(jnp.where(hit_WP, scores_WP, 0.0), axis=1, keepdims=True)
        here_WQ = choice_WQ == k
        chosen_WQ = jnp.where(here_WQ, jnp.where(live_W1, chosen_W1, static.E), chosen_WQ)
        gates_WQ = jnp.where(here_WQ, jnp.where(live_W1, gate_W1, 0.0), gates_WQ)
        return jnp.where(hit_WP, -jnp.inf, key_WP), chosen_WQ, gates_WQ

    begin = (key_WP, jnp.full((W, Q), static.E, jnp.int32), jnp.zeros((W, Q), jnp.float32))
    left_WP, chosen_WQ, gates_WQ = jax.lax.fori_loop(0, settings.k, choose, begin)
    if settings.renormalize:
        gates_WQ = gates_WQ / (jnp.sum(gates_WQ, axis=1, keepdims=True) + scoring.EPSILON)
    taken_WP = (left_WP == -jnp.inf) & (expert_WP < static.E) & live_W1
    return chosen_WQ, gates_WQ * settings.scale, taken_WP


def _pick(chosen_WQ: Array, values_WP: Array, count: int) -> Array:
    """values[w, chosen[w, q]], (W, Q); 0 where no expert is chosen."""
    (W, P), choice_WQ = values_WP.shape, jax.lax.broadcasted_iota(jnp.int32, chosen_WQ.shape, 1)
    expert_WP = jax.lax.broadcasted_iota(jnp.int32, (W, P), 1)

    def pick(k: Array, picked_WQ: Array) -> Array:
        here_WQ = choice_WQ == k
        id_W1 = jnp.sum(jnp.where(here_WQ, chosen_WQ, 0), axis=1, keepdims=True, dtype=jnp.int32)
        value_W1 = jnp.sum(jnp.where(expert_WP == id_W1, values_WP, 0), axis=1, keepdims=True, dtype=jnp.int32)
        return jnp.where(here_WQ, value_W1, picked_WQ)

    return jax.lax.fori_loop(0, count, pick, jnp.zeros(chosen_WQ.shape, jnp.int32))


def _iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def power_above(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
