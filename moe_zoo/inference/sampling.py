"""How the next token is drawn. Every setting is data: another temperature compiles nothing.

B sequences, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the most likely token. Of the tempered distribution are kept: the `top_k` most likely
    tokens, of these the smallest set whose probability reaches `top_p`, and of these what is at least `min_p` times as
    likely as the best. Ties at a threshold are kept.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not (
            0 <= self.temperature < float("inf")
            and 0 < self.top_p <= 1
            and 0 <= self.min_p <= 1
            and (self.top_k is None or self.top_k >= 1)
        ):
            raise ValueError(f"expected temperature >= 0, top_k >= 1, 0 < top_p <= 1, 0 <= min_p <= 1; got {self}")

    def arrays(self, vocab_size: int) -> dict[str, Array]:
        """The settings as arguments of a compiled function; `top_k` between 1 and V."""
        top_k = vocab_size if self.top_k is None else min(self.top_k, vocab_size)
        return {
            "temperature": jnp.float32(self.temperature), "top_k": jnp.int32(top_k),
            "top_p": jnp.float32(self.top_p), "min_p": jnp.float32(self.min_p),
        }  # fmt: skip


def draw(keys_B: Array, logits_BV: Float[Array, "B V"], settings: dict[str, Array]) -> Int[Array, "B"]:
    """One id per sequence, each from its own key. Sorting a vocabulary is slow, so it is done only where it matters."""
    V = logits_BV.shape[-1]
    scaled_BV = logits_BV / jnp.maximum(settings["temperature"], 1e-6)
    is_filtered = (settings["top_k"] < V) | (settings["top_p"] < 1) | (settings["min_p"] > 0)

    def sampled(scaled_BV):
        kept_BV = jax.lax.cond(is_filtered, lambda z: filtered(z, settings), lambda z: z, scaled_BV)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    greedy = lambda scaled_BV: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(settings["temperature"] == 0, greedy, sampled, scaled_BV)


def filtered(z_BV: Float[Array, "B V"], settings: dict[str, Array]) -> Float[Array, "B V"]:
    """Logits with -inf where a token is not kept."""
    ordered_BV = jnp.sort(z_BV, axis=-1, descending=True)
    last_B1 = jnp.take(ordered_BV, settings["top_k"] - 1, axis=-1)[:, None]
    probs_BV = jax.nn.softmax(jnp.where(ordered_BV < last_B1, -jnp.inf, ordered_BV))
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    keep_BV = (before_BV < settings["top_p"]) & (probs_BV >= settings["min_p"] * probs_BV[:, :1])
    # tokens beyond the k-th have probability 0 and, with min_p = 0, would pass where top_p = 1
    keep_BV &= ordered_BV >= last_B1
    lowest_B1 = jnp.min(jnp.where(keep_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(z_BV < lowest_B1, -jnp.inf, z_BV)
