"""The definition, in plain jnp: a full sort of every token's scores, and a dense count over all choices. For tests.

Dims as in api.py.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.route_top_k import scoring


def route(logits_TE: Array, bias_E: Array | None, valid_T: Array | None, *, settings: scoring.Settings) -> tuple:
    """(experts, gates, counts, positions, scores or None)."""
    E = logits_TE.shape[1]
    scores_TE = scoring.scores(logits_TE, settings.score_function)
    key_TE = scoring.selection_key(scores_TE, bias_E)
    experts_TK = jnp.argsort(-key_TE, axis=1, stable=True)[:, : settings.k].astype(jnp.int32)
    if valid_T is not None:
        experts_TK = jnp.where(valid_T[:, None], experts_TK, E)
    counts_E, positions_TK = positions(experts_TK, num_experts=E, priority=settings.priority)
    gates_TK = scoring.gates(scores_TE, experts_TK, settings)
    return experts_TK, gates_TK, counts_E, positions_TK, scores_TE if settings.return_scores else None


def positions(experts_TK: Array, *, num_experts: int, priority: scoring.Priority) -> tuple[Array, Array]:
    """(choices per expert, earlier choices of the same expert)."""
    T, K = experts_TK.shape
    ids_N = (experts_TK.T if priority == "choice" else experts_TK).reshape(-1)
    onehot_NE = (ids_N[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    earlier_N = ((jnp.cumsum(onehot_NE, axis=0, dtype=jnp.int32) - onehot_NE) * onehot_NE).sum(1, dtype=jnp.int32)
    positions_TK = earlier_N.reshape(K, T).T if priority == "choice" else earlier_N.reshape(T, K)
    return onehot_NE.sum(0, dtype=jnp.int32), positions_TK


def rows(experts_TK: Array, *, num_experts: int) -> tuple[Array, Array]:
    """(choices per expert, rank of each choice when sorted by expert)."""
    counts_E, positions_TK = positions(experts_TK, num_experts=num_experts, priority="token")
    starts_E = jnp.append(jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E, experts_TK.size)
    return counts_E, starts_E[experts_TK] + positions_TK
