"""Vectorised jnp: XLA's top-k, and positions from counts per block of choices. No sort of the choices, no scatter.

Dims as in api.py; N = T * K choices in order of priority, as B blocks of b.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.route_top_k import scoring

#: Choices per block: within one every pair is compared, across blocks counts are summed. Up to 32, and over the middle
#: dim, XLA's CPU compiler makes vector code of both (jaxlib 0.10.2 and 0.12): ten times faster than at 64.
_BLOCK = 32


def route(logits_TE: Array, bias_E: Array | None, valid_T: Array | None, *, settings: scoring.Settings) -> tuple:
    """(experts, gates, counts, positions, scores or None)."""
    E = logits_TE.shape[1]
    scores_TE = scoring.scores(logits_TE, settings.score_function)
    experts_TK = jax.lax.top_k(scoring.selection_key(scores_TE, bias_E), settings.k)[1].astype(jnp.int32)
    if valid_T is not None:
        experts_TK = jnp.where(valid_T[:, None], experts_TK, E)
    counts_E, positions_TK = positions(experts_TK, num_experts=E, priority=settings.priority)
    gates_TK = scoring.gates(scores_TE, experts_TK, settings)
    return experts_TK, gates_TK, counts_E, positions_TK, scores_TE if settings.return_scores else None


def positions(experts_TK: Array, *, num_experts: int, priority: scoring.Priority) -> tuple[Array, Array]:
    """(choices per expert, earlier choices of the same expert)."""
    counts_E, positions_TK = _ranks(experts_TK, num_experts, priority, from_expert_start=False)
    return counts_E, jnp.where(experts_TK < num_experts, positions_TK, 0)


def rows(experts_TK: Array, *, num_experts: int) -> tuple[Array, Array]:
    """(choices per expert, rank of each choice when sorted by expert)."""
    counts_E, rows_TK = _ranks(experts_TK, num_experts, "token", from_expert_start=True)
    return counts_E, jnp.where(experts_TK < num_experts, rows_TK, experts_TK.size)


def _ranks(experts_TK: Array, E: int, priority: scoring.Priority, from_expert_start: bool) -> tuple[Array, Array]:
    """(choices per expert, rank among the choices of the same expert or of all), the latter for real experts only."""
    T, K = experts_TK.shape
    if experts_TK.size == 0:
        return jnp.zeros(E, jnp.int32), jnp.zeros((T, K), jnp.int32)
    ids_N = (experts_TK.T if priority == "choice" else experts_TK).reshape(-1).astype(jnp.int32)
    ids_Bb = jnp.pad(ids_N, (0, -ids_N.size % _BLOCK), constant_values=E).reshape(-1, _BLOCK)
    is_earlier_bb = jnp.arange(_BLOCK)[:, None] < jnp.arange(_BLOCK)
    same_Bbb = (ids_Bb[:, :, None] == ids_Bb[:, None, :]) & is_earlier_bb
    counts_BE = (ids_Bb[:, :, None] == jnp.arange(E, dtype=jnp.int32)).sum(1, dtype=jnp.int32)
    ends_BE = jnp.cumsum(counts_BE, axis=0, dtype=jnp.int32)
    counts_E = ends_BE[-1]  # summing counts_BE once more would make XLA count once more
    starts_BE = ends_BE - counts_BE
    if from_expert_start:
        starts_BE = starts_BE + (jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E)
    ranks_Bb = same_Bbb.sum(1, dtype=jnp.int32) + _look_up(starts_BE, ids_Bb)
    ranks_N = ranks_Bb.reshape(-1)[: T * K]
    return counts_E, ranks_N.reshape(K, T).T if priority == "choice" else ranks_N.reshape(T, K)


def _look_up(values_BE: Array, ids_Bb: Array) -> Array:
    """values[b, id], anything where the id is E. Indexing is fast on CPUs and slow on TPUs."""
    index = lambda values_BE, ids_Bb: jnp.take_along_axis(values_BE, ids_Bb, axis=1, mode="clip")

    def compare(values_BE: Array, ids_Bb: Array) -> Array:
        hit_BbE = ids_Bb[..., None] == jnp.arange(values_BE.shape[1], dtype=jnp.int32)
        return jnp.where(hit_BbE, values_BE[:, None, :], 0).sum(2, dtype=jnp.int32)

    return jax.lax.platform_dependent(values_BE, ids_Bb, tpu=compare, default=index)
