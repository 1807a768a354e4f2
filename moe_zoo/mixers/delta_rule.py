"""The gated delta rule (arXiv 2412.06464), in chunks by the triangular systems of DeltaNet (arXiv 2406.06484).

    S_t = (I - beta_t k_t k_t^T) D_t S_{t-1} + beta_t k_t v_t^T;   y_t = S_t^T q_t;   D_t = exp(g_t)

The decay is one number per head (Gated DeltaNet) or one per component of the key (Kimi Delta Attention, arXiv
2510.26692). B batch, S sequence, H heads, N key size, P value size, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.mixers.chunks import cut

_CHUNK = 64
_CHUNK_WIDE = 16  # with a decay per component pairs of tokens are C^2 N numbers


def delta_rule(
    q_BSHN: Float[Array, "B S H N"],
    k_BSHN: Float[Array, "B S H N"],
    v_BSHP: Float[Array, "B S H P"],
    beta_BSH: Float[Array, "B S H"],
    log_decay: Float[Array, "B S H *N"],
    state_BHNP: Float[Array, "B H N P"],
    documents: Int[Array, "B S"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"]]:
    """(y, the state behind the last token), in float32 or wider. Log decays are at most 0, keys of length 1.

    A token with beta 0 and log decay 0 changes nothing.
    """
    wide = log_decay.ndim == 4
    if v_BSHP.shape[1] == 1:
        return _step(q_BSHN, k_BSHN, v_BSHP, beta_BSH, log_decay, state_BHNP)
    chunk = chunk or (_CHUNK_WIDE if wide else _CHUNK)
    chunks, (q, k, v, beta) = cut(log_decay, documents, chunk, q_BSHN, k_BSHN, v_BSHP, beta_BSH)
    pairs = chunks.pairs()
    if wide:
        dots = lambda a: jnp.einsum("bnchk,bndhk,bncdhk->bnhcd", a, k, pairs)
        start, end, whole = chunks.start(), chunks.end(), chunks.whole()
    else:
        dots = lambda a: jnp.einsum("bnchk,bndhk,bncdh->bnhcd", a, k, pairs)
        start, end, whole = (x[..., None] for x in (chunks.start(), chunks.end(), chunks.whole()))
    # what each token adds to the state is v minus what earlier ones of the chunk and the state already say
    system = jnp.where(chunks.sees(itself=False)[:, :, None], dots(k * beta[..., None]), 0)
    both = jnp.concatenate([v, k * start], -1) * beta[..., None]
    solved = jax.lax.linalg.triangular_solve(
        system, jnp.swapaxes(both, 2, 3), left_side=True, lower=True, unit_diagonal=True
    )
    own, seen = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]

    def step(state, xs):
        own, seen, q, k, inside, whole = xs
        new = own - seen @ state
        y = jnp.einsum("bchk,bhkp->bhcp", q, state) + inside @ new
        return state * whole[..., None] + jnp.einsum("bchk,bhcp->bhkp", k, new), y

    xs = (own, seen, q * start, k * end, dots(q), jnp.broadcast_to(whole, (*whole.shape[:-1], k.shape[-1])))
    state, y = jax.lax.scan(step, state_BHNP.astype(own.dtype), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    return chunks.join(y.transpose(1, 0, 3, 2, 4)), state


def _step(q, k, v, beta, log_decay, state):
    wide = lambda x: x[:, 0].astype(jnp.promote_types(x.dtype, jnp.float32))
    q, k, v, beta, decay = wide(q), wide(k), wide(v), wide(beta), jnp.exp(wide(log_decay))
    old = state.astype(v.dtype) * (decay if decay.ndim == 3 else decay[..., None])[..., None]
    new = (v - jnp.einsum("bhk,bhkp->bhp", k, old)) * beta[..., None]
    state = old + k[..., None] * new[..., None, :]
    return jnp.einsum("bhk,bhkp->bhp", q, state)[:, None], state


def unit(x: Float[Array, "*b N"], eps: float = 1e-6) -> Float[Array, "*b N"]:
    """x / sqrt(|x|^2 + eps), in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)
