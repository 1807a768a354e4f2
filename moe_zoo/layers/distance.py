"""Where a token is, for attention that does not rotate: T5's bias by distance, and sines of the position.

B batch, S queries, L keys, N heads, D model.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.core.param import Normal, param


class RelativeBias(nnx.Module):
    """A learned number per head and range of distances, added to the scores of every layer (T5, arXiv 1910.10683,
    section 2.1).
    """

    def __init__(self, num_heads: int, *, buckets: int, max_distance: int, both_ways: bool):
        """`both_ways`: half of the `buckets` are for keys ahead of the query; else those share the first one."""
        self.both_ways = both_ways
        self.of_distance = tuple(ranges(buckets // 2 if both_ways else buckets, max_distance).tolist())
        self.table = param((buckets, num_heads), (None, "heads"), Normal(0.02))

    def __call__(self, S: int, L: int, first: int | Int[Array, ""] = 0) -> Float[Array, "N S L"]:
        """For queries at the places `first`, `first` + 1, ... among L keys."""
        ahead_SL = jnp.arange(L) - (first + jnp.arange(S))[:, None]
        of_distance = jnp.asarray(self.of_distance, jnp.int32)
        distance_SL = jnp.abs(ahead_SL) if self.both_ways else jnp.maximum(-ahead_SL, 0)
        bucket_SL = of_distance[jnp.minimum(distance_SL, len(self.of_distance) - 1)]
        table_XN = self.table[...].astype(jnp.promote_types(self.table[...].dtype, jnp.float32))
        if self.both_ways:
            bucket_SL = bucket_SL + jnp.where(ahead_SL > 0, len(table_XN) // 2, 0)
        return jnp.moveaxis(table_XN[bucket_SL], -1, 0)


def ranges(buckets: int, max_distance: int) -> Int[np.ndarray, "distances"]:
    """The bucket of each distance from 0 to `max_distance`, from where on it is the last: the nearer half one each, the
    others for ranges that grow in proportion.
    """
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    far = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact) * (buckets - exact)
    # a distance where a range begins must not fall below it by rounding
    far = np.minimum(exact + np.floor(far + 1e-6).astype(int), buckets - 1)
    return np.where(distance < exact, distance, far)


def sines(positions_BS: Int[Array, "B S"], D: int) -> Float[Array, "B S D"]:
    """sin(p w_i), then cos(p w_i), w_i = 10000^(-i / (D/2 - 1)): as in tensor2tensor, not arXiv 1706.03762."""
    half = D // 2
    # in float32 throughout, as transformers makes its table
    w = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000) / (half - 1)))
    angles = positions_BS.astype(jnp.float32)[..., None] * w
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
