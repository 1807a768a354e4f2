"""Linear attention with a decay per head and token: of Mamba-2 (arXiv 2405.21060, "SSD") and lightning attention.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T;   y_t = S_t^T q_t

B batch, S sequence, G key heads, H = G r value heads (value head h has the keys of key head h // r), N key size,
P value size, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.mixers.chunks import cut

_CHUNK = 64


def linear_attention(
    q_BSGN: Float[Array, "B S G N"],
    k_BSGN: Float[Array, "B S G N"],
    v_BSHP: Float[Array, "B S H P"],
    log_decay_BSH: Float[Array, "B S H"],
    state_BHNP: Float[Array, "B H N P"],
    documents: Int[Array, "B S"] | None = None,
    chunk: int = _CHUNK,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"]]:
    """(y, the state behind the last token), in float32 or wider. Log decays are at most 0.

    In chunks: S C (N + P) per value head for what is inside, 2 S N P for the state; one step where S is 1.
    """
    B, S, H, P = v_BSHP.shape
    G, N = k_BSGN.shape[2:]
    grouped = lambda x, axis: x.reshape(*x.shape[:axis], G, H // G, *x.shape[axis + 1 :])
    if S == 1:
        return _step(q_BSGN, k_BSGN, v_BSHP, log_decay_BSH, state_BHNP, grouped)
    chunks, (q, k, v) = cut(log_decay_BSH, documents, chunk, q_BSGN, k_BSGN, v_BSHP)
    scores = jnp.einsum("bncgk,bndgk->bncdg", q, k)
    weights = scores[..., None] * grouped(chunks.pairs(), 4)
    y = jnp.einsum("bncdgr,bndgrp->bncgrp", weights, grouped(v, 3))
    added = jnp.einsum("bncgk,bncgrp->bngrkp", k, grouped(v * chunks.end()[..., None], 3))

    def step(state, xs):
        whole, added = xs
        return state * whole[..., None, None] + added, state

    by_chunk = lambda x: jnp.moveaxis(x, 1, 0)
    state = grouped(state_BHNP.astype(added.dtype), 1)
    state, before = jax.lax.scan(step, state, (by_chunk(grouped(chunks.whole(), 2)), by_chunk(added)))
    carried = jnp.einsum("bncgk,nbgrkp->bncgrp", q, before) * grouped(chunks.start(), 3)[..., None]
    return chunks.join((y + carried).reshape(*v.shape)), state.reshape(B, H, N, P)


def _step(q, k, v, log_decay, state, grouped):
    wide = lambda x: x[:, 0].astype(jnp.promote_types(x.dtype, jnp.float32))
    q, k, v, decay = wide(q), wide(k), wide(v), jnp.exp(wide(log_decay))
    old = state.astype(v.dtype) * decay[..., None, None]
    new = grouped(old, 1) + jnp.einsum("bgk,bgrp->bgrkp", k, grouped(v, 1))
    return jnp.einsum("bgk,bgrkp->bgrp", q, new).reshape(v.shape)[:, None], new.reshape(old.shape)
