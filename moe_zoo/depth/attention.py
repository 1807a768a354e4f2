"""How much attention a token got in a block: what selectors of the next block may look at.

    a_t = mean of n_i p_it over heads and over the queries i that could see t
    p the weights of attention, n_i how many keys query i sees: 1 is what all would get if they were equal

Of a prompt, which is there at once, all its queries count. Behind it a token is judged when it comes, by what can be
known then: its own query, so that no token depends on later ones. Queries of tokens that pass the block by ask nothing.

B batch, S queries, L keys, N query heads, M key-value heads, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import AttentionView

#: where the carry through the layers has it
DEPTH = "depth"


def received(
    view: AttentionView,
    asks_BS: Bool[Array, "B S"] | None,
    prompt_BS: Bool[Array, "B S"] | None,
    before_BS: Float[Array, "B S"],
) -> Float[Array, "B S"]:
    """a of the tokens of this call, with no gradient; `before_BS` for a token that no query could see. `prompt_BS`
    None: all are of the prompt.
    """
    everyone = jnp.ones(before_BS.shape, bool)
    asks_BS, prompt_BS = (everyone if a is None else a for a in (asks_BS, prompt_BS))
    sees_BSS, weights_BSS = _of_call(view)
    together_BSS = prompt_BS[:, :, None] & prompt_BS[:, None, :] | jnp.eye(prompt_BS.shape[1], dtype=bool)
    counts_BSS = sees_BSS & together_BSS & asks_BS[:, :, None]
    count_BS = counts_BSS.sum(1)
    total_BS = jnp.where(counts_BSS, weights_BSS, 0).sum(1)
    return jnp.where(count_BS > 0, total_BS / jnp.maximum(count_BS, 1), before_BS)


def _of_call(view: AttentionView) -> tuple[Bool[Array, "B S S"], Float[Array, "B S S"]]:
    """(who of this call sees whom of it, with which weight, the mean over heads)."""
    q, k, sight = jax.lax.stop_gradient(view.q), jax.lax.stop_gradient(view.k), view.sight
    B, N, S, H = q.shape
    mask_BSL = sight.mask(slice(None), slice(None), view.window)
    scores = jnp.einsum("bmgsh,bmlh->bmgsl", q.reshape(B, -1, N // k.shape[1], S, H), k)
    scores = jnp.where(mask_BSL[:, None, None], scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -jnp.inf)
    # a query that sees nothing counts for nobody
    weights_BSL = jnp.where(mask_BSL, jax.nn.softmax(scores, axis=-1).mean((1, 2)), 0) * mask_BSL.sum(2, keepdims=True)
    if sight.first is None:
        return mask_BSL, weights_BSL
    places_BS = jnp.broadcast_to(sight.first, (B,))[:, None] + jnp.arange(S)
    own = lambda a_BSL: jnp.take_along_axis(a_BSL, places_BS[:, None, :], axis=2)
    return own(mask_BSL), own(weights_BSL)
