"""Vectorised jnp: XLA's top-k, and positions from counts per block of choices. No sort of the choices, no scatter.

Dims as in api.py; B blocks of b choices, in order of priority.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.route_top_k import scoring

#: Choices per block: within one every pair is compared, across blocks counts are summed. Up to 32, and over the middle
#: dim, XLA's CPU compiler makes vector code of both (jaxlib 0.10.2 and 0.12): ten times faster than at 64.
_BLOCK = 32
#: On a TPU: rows per block, as wide as its smallest matrix unit.
_MATMUL_BLOCK = 128


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
    # X rows of J choices, earlier ones first
    experts_XJ = (experts_TK.T.reshape(-1, 1) if priority == "choice" else experts_TK).astype(jnp.int32)
    by_pairs, by_matmul = (functools.partial(f, E=E, start=from_expert_start) for f in (_by_pairs, _by_matmul))
    counts_E, ranks_XJ = jax.lax.platform_dependent(experts_XJ, tpu=by_matmul, default=by_pairs)
    return counts_E, ranks_XJ.reshape(K, T).T if priority == "choice" else ranks_XJ


def _blocks(rows: Array, size: int, fill: int) -> Array:
    padding = ((0, -rows.shape[0] % size), *[(0, 0)] * (rows.ndim - 1))
    return jnp.pad(rows, padding, constant_values=fill).reshape(-1, size, *rows.shape[1:])


def starts(counts_BE: Array, from_expert_start: bool) -> tuple[Array, Array]:
    """(counts of all blocks, rank of each block's first choice of each expert)."""
    ends_BE = jnp.cumsum(counts_BE, axis=0, dtype=jnp.int32)
    counts_E = ends_BE[-1]  # summing counts_BE once more would make XLA count once more
    starts_BE = ends_BE - counts_BE
    return counts_E, starts_BE + (jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E) if from_expert_start else starts_BE


def _by_pairs(experts_XJ: Array, *, E: int, start: bool) -> tuple[Array, Array]:
    """Within a block all pairs of choices are compared."""
    ids_Bb = _blocks(experts_XJ.reshape(-1), _BLOCK, fill=E)
    is_earlier_bb = jnp.arange(_BLOCK)[:, None] < jnp.arange(_BLOCK)
    same_Bbb = (ids_Bb[:, :, None] == ids_Bb[:, None, :]) & is_earlier_bb
    counts_BE = (ids_Bb[:, :, None] == jnp.arange(E, dtype=jnp.int32)).sum(1, dtype=jnp.int32)
    counts_E, starts_BE = starts(counts_BE, start)
    ranks_Bb = same_Bbb.sum(1, dtype=jnp.int32) + jnp.take_along_axis(starts_BE, ids_Bb, axis=1, mode="clip")
    return counts_E, ranks_Bb.reshape(-1)[: experts_XJ.size].reshape(experts_XJ.shape)


def _by_matmul(experts_XJ: Array, *, E: int, start: bool) -> tuple[Array, Array]:
    """For TPUs, where indexing is slow and a product is not: one-hot rows times a triangle, exact in float32."""
    hit_XJE = experts_XJ[..., None] == jnp.arange(E, dtype=jnp.int32)
    hits_BbE = _blocks(hit_XJE.sum(1, dtype=jnp.bfloat16), _MATMUL_BLOCK, fill=0)
    is_earlier_bb = jnp.arange(_MATMUL_BLOCK)[:, None] > jnp.arange(_MATMUL_BLOCK)
    earlier_BbE = jnp.einsum(
        "ij,bje->bie", is_earlier_bb.astype(jnp.bfloat16), hits_BbE, preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    counts_E, starts_BE = starts(hits_BbE.sum(1, dtype=jnp.float32).astype(jnp.int32), start)
    earlier_XE = (earlier_BbE + starts_BE[:, None]).reshape(-1, E)[: experts_XJ.shape[0]]
    ranks_XJ = jnp.where(hit_XJE, earlier_XE[:, None], 0).sum(2, dtype=jnp.int32)
    same_XJJ = experts_XJ[:, :, None] == experts_XJ[:, None, :]
    is_earlier_JJ = jnp.arange(experts_XJ.shape[1])[:, None] > jnp.arange(experts_XJ.shape[1])
    return counts_E, ranks_XJ + (same_XJJ & is_earlier_JJ).sum(2, dtype=jnp.int32)
