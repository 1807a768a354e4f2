"""Hash layers (Roller et al., arXiv 2106.04426): the token id says which expert. No router, no loss, gate 1.

    e = table[layer, token_id];  y = E_e(x)

The table is random and even over the vocabulary by default (a shuffled id, modulo E), another for every layer. The
paper's better one, "balanced", is made from the training data: frequent tokens first, each to the expert with the least
load so far.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Frozen, param
from moe_zoo.routing.router import Dims, Router


@dataclasses.dataclass(frozen=True)
class HashedConfig:
    """`table`: "random" (even over the vocabulary, per layer), "modulo" (id mod E, the same in every layer), "balanced"
    (even over the training data, the same in every layer; before training no token has an expert).
    """

    table: Literal["random", "modulo", "balanced"] = "random"


@dataclasses.dataclass(frozen=True)
class Table:
    """Initializer of a table of expert ids."""

    kind: str
    num_experts: int

    def __call__(self, rng: np.random.Generator, shape) -> np.ndarray:
        if self.kind == "balanced":  # `from_corpus` fills it in
            return np.full(shape, self.num_experts)
        ids = np.arange(shape[0]) if self.kind == "modulo" else rng.permutation(shape[0])
        return ids % self.num_experts


class Hashed(Router):
    """A fixed map from token id to expert."""

    Config = HashedConfig
    requires = ("token_ids",)
    provides = ()

    def __init__(self, config: HashedConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        init = Table(config.table, dims.num_experts)
        self.table = param((dims.vocab_size,), (None,), init, dtype=jnp.int32, kind=Frozen)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        experts_T1 = self.table[...][ctx.token_ids][:, None]
        return Routing(TokenChoice(experts_T1, jnp.ones(experts_T1.shape, jnp.float32), self.num_experts))

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        return {"table": balanced_table(counts_V, self.num_experts)} if self.config.table == "balanced" else {}

    def max_active(self) -> int:
        return 1

    def flops_per_token(self, hidden_size: int) -> float:
        return 0


def balanced_table(counts_V: Int[np.ndarray, "V"], num_experts: int) -> Int[np.ndarray, "V"]:
    """Tokens by descending count, each to the least loaded expert: no expert is further above another in corpus load
    than the count of the least frequent token it was last given.
    """
    heap = [(0, e) for e in range(num_experts)]
    table = np.zeros(len(counts_V), np.int32)
    for token in np.argsort(-np.asarray(counts_V), kind="stable"):
        load, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (load + int(counts_V[token]), expert))
    return table
