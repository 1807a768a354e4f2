"""The selective scan of Mamba (arXiv 2312.00752): a diagonal state per channel, its step size from the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;   y_t = h_t C_t

B batch, S sequence, P channels, N state size of each, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CHUNK = 64


def selective_scan(
    x_BSP: Float[Array, "B S P"],
    dt_BSP: Float[Array, "B S P"],
    A_PN: Float[Array, "P N"],
    b_BSN: Float[Array, "B S N"],
    c_BSN: Float[Array, "B S N"],
    state_BPN: Float[Array, "B P N"],
    documents: Int[Array, "B S"] | None = None,
    chunk: int = _CHUNK,
) -> tuple[Float[Array, "B S P"], Float[Array, "B P N"]]:
    """(y, the state behind the last token), in float32 or wider. A is negative; a token with dt 0 changes nothing.

    Within a chunk an associative scan; the states of one chunk at a time are in memory, and made again by the backward
    pass.
    """
    B, S, P = x_BSP.shape
    C = min(chunk, S)
    n = -(-S // C)
    starts = jnp.zeros((B, S), bool)
    if documents is not None:
        starts = starts.at[:, 1:].set(jnp.diff(documents, axis=1) != 0)

    def split(t):
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32)) if t.dtype != bool else t
        t = jnp.pad(t, [(0, 0), (0, n * C - S)] + [(0, 0)] * (t.ndim - 2))
        return jnp.moveaxis(t.reshape(B, n, C, *t.shape[2:]), 1, 0)

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    @jax.checkpoint
    def step(state, xs):
        x, dt, b, c, starts = xs
        keep = jnp.where(starts[..., None, None], 0, jnp.exp(dt[..., None] * A_PN))
        decay, added = jax.lax.associative_scan(join, (keep, (dt * x)[..., None] * b[:, :, None]), axis=1)
        states = decay * state[:, None] + added
        return states[:, -1], jnp.einsum("bcpn,bcn->bcp", states, c)

    xs = tuple(split(t) for t in (x_BSP, dt_BSP, b_BSN, c_BSN, starts))
    state, y = jax.lax.scan(step, state_BPN.astype(xs[0].dtype), xs)
    return jnp.moveaxis(y, 0, 1).reshape(B, n * C, P)[:, :S], state
