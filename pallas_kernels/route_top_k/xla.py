"""Vectorised jnp: XLA's top-k, and positions from counts per block of choices. No sort of the choices, no scatter.

Dims as in api.py; N = T * K choices in order of priority, as B blocks of b.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.route_top_k import reference, scoring

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
    (T, K), E = experts_TK.shape, num_experts
    if experts_TK.size == 0:
        return reference.positions(experts_TK, num_experts=E, priority=priority)
    ids_N = (experts_TK.T if priority == "choice" else experts_TK).reshape(-1).astype(jnp.int32)
    ids_Bb = jnp.pad(ids_N, (0, -ids_N.size % _BLOCK), constant_values=E).reshape(-1, _BLOCK)
    is_earlier_bb = jnp.arange(_BLOCK)[:, None] < jnp.arange(_BLOCK)
    same_Bbb = (ids_Bb[:, :, None] == ids_Bb[:, None, :]) & is_earlier_bb
    counts_BE = (ids_Bb[:, :, None] == jnp.arange(E, dtype=jnp.int32)).sum(1, dtype=jnp.int32)
    ends_BE = jnp.cumsum(counts_BE, axis=0, dtype=jnp.int32)
    earlier_blocks_Bb = jnp.take_along_axis(ends_BE - counts_BE, jnp.minimum(ids_Bb, E - 1), axis=1)
    earlier_Bb = jnp.where(ids_Bb < E, earlier_blocks_Bb + same_Bbb.sum(1, dtype=jnp.int32), 0)
    earlier_N = earlier_Bb.reshape(-1)[: T * K]
    positions_TK = earlier_N.reshape(K, T).T if priority == "choice" else earlier_N.reshape(T, K)
    return ends_BE[-1], positions_TK
