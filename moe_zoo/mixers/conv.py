"""A short causal convolution over the sequence, of every channel by itself, with the last inputs as its state.

B batch, S sequence, C channels, K taps.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.mixers.mixer import Span


def causal_conv(
    x_BSC: Float[Array, "B S C"],
    kernel_CK: Float[Array, "C K"],
    bias_C: Float[Array, "C"] | None,
    span: Span,
    state_BkC: Float[Array, "B K-1 C"],
) -> tuple[Float[Array, "B S C"], Float[Array, "B K-1 C"]]:
    """(y, the last K - 1 inputs that are no padding): y_t = sum_j kernel_j x_{t - (K - 1) + j} (+ bias), `state` being
    the inputs before the first. No document sees an input of another.
    """
    B, S, _ = x_BSC.shape
    K = kernel_CK.shape[1]
    kernel = kernel_CK.astype(x_BSC.dtype)
    padded = jnp.concatenate([state_BkC.astype(x_BSC.dtype), x_BSC], axis=1)
    y_BSC = jnp.zeros_like(x_BSC) if bias_C is None else jnp.broadcast_to(bias_C.astype(x_BSC.dtype), x_BSC.shape)
    for j in range(K):
        tap = padded[:, j : j + S] * kernel[:, j]
        back = K - 1 - j
        if span.documents is not None and back:
            own = jnp.pad(span.documents[:, back:] == span.documents[:, :-back], ((0, 0), (min(back, S), 0)))[:, :S]
            tap = jnp.where(own[..., None], tap, 0)
        y_BSC = y_BSC + tap
    if span.count is None:
        return y_BSC, padded[:, S:]
    rows = span.count[:, None] + jnp.arange(K - 1)
    return y_BSC, jnp.take_along_axis(padded, rows[..., None], axis=1)
