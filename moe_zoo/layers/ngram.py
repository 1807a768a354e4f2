"""Hashed n-gram embeddings: what the last few tokens were, looked up instead of computed.

    x_t += sum over n of table_n[hash(token_{t-n+1}, ..., token_t) mod buckets]

Byte Latent Transformer, arXiv 2412.09871, section 3.2.1 (there n = 3 to 8 and a rolling polynomial hash). Ours: a sum
instead of a mean, one table per order, FNV-1a over the token ids. An n-gram never reaches into an earlier document:
before a document's start stands a sentinel. A lookup costs no FLOPs, so a small byte-level model gets cheap memory of
spelling.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from moe_zoo.core.param import Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive

_FNV_PRIME, _FNV_OFFSET = np.uint32(16777619), np.uint32(2166136261)


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """`orders`: the n of each table, empty for none. `buckets`: rows of each table."""

    orders: tuple[int, ...] = ()
    buckets: int = 8192
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "buckets", "init_std")
        if any(n < 2 for n in self.orders) or len(set(self.orders)) != len(self.orders):
            raise ConfigError(f"{join(path, 'orders')}: expected different numbers >= 2, got {list(self.orders)}")


class NgramEmbedding(nnx.Module):
    """The sum of one embedding per order. Its cache is the last max(orders) - 1 tokens."""

    def __init__(self, config: NgramConfig, *, vocab_size: int, hidden_size: int):
        self.config, self.vocab_size = config, vocab_size
        shape = (len(config.orders), config.buckets, hidden_size)
        self.tables = param(shape, (None, "vocab", "embed"), Normal(config.init_std))

    @property
    def reach(self) -> int:
        """Earlier tokens that an embedding depends on."""
        return max(self.config.orders) - 1

    def init_cache(self, batch: int) -> Int[Array, "B reach"]:
        return jnp.zeros((batch, self.reach), jnp.int32)

    def __call__(self, tokens_BS: Int[Array, "B S"], positions_BS: Int[Array, "B S"], cache, dtype):
        """(embeddings [B, S, D], cache). `positions` count from each document's start and say what lies before it."""
        ids = self.buckets(tokens_BS, positions_BS, cache)
        tables = self.tables[...].astype(dtype)
        total = sum(jnp.take(tables[i], ids[i], axis=0) for i in range(len(self.config.orders)))
        if cache is not None:
            cache = jnp.concatenate([cache, tokens_BS], axis=1)[:, -self.reach :]
        return total, cache

    def buckets(self, tokens_BS, positions_BS, cache=None) -> list[Int[Array, "B S"]]:
        """The row of each order's table for every position."""
        B, S = tokens_BS.shape
        before = jnp.zeros((B, self.reach), jnp.int32) if cache is None else cache
        padded = jnp.concatenate([before, tokens_BS], axis=1)
        hashed, rows = jnp.full((B, S), _FNV_OFFSET), []
        for back in range(self.reach + 1):
            token = padded[:, self.reach - back : self.reach - back + S]
            token = jnp.where(positions_BS >= back, token, self.vocab_size).astype(jnp.uint32)
            hashed = (hashed ^ token) * _FNV_PRIME
            if back + 1 in self.config.orders:
                # the low bits of FNV are weak for short input: fold the high ones in
                mixed = hashed ^ (hashed >> 15)
                rows.append(((mixed * np.uint32(2246822519)) >> 7).astype(jnp.int32) % self.config.buckets)
        return rows
