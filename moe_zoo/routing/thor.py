"""THOR (Zuo et al., arXiv 2110.04260): stochastic experts. No router, no gate, no balance loss: an expert is drawn.

    e ~ Uniform{0, ..., E-1};   y = E_e(x)

In training one draw serves the whole batch (as in the authors' code), a document, or a token. The model is run on every
batch twice, with independent draws that should agree: that is the objective `thor`.

At inference experts are drawn too, one for each document or token. Those draws follow from the key, if there is one (an
evaluation has one for every batch), `eval_seed`, the layer, the row, the document in it, and for tokens the position:
a text that is decoded with a cache has the draws of one forward pass over all of it, and a document keeps its experts.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.context import Routing, RoutingContext, keys_by_place
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import Dims, Router

Granularity = Literal["batch", "sequence", "token"]


@dataclasses.dataclass(frozen=True)
class ThorConfig:
    """`granularity`: what one draw is for in training: a layer's whole (micro-)batch, each document of a row, or each
    token; `eval_granularity`: the same at inference. `eval_seed`: another seed is another draw there.
    """

    granularity: Granularity = "batch"
    eval_granularity: Granularity = "sequence"
    eval_seed: int = 0

    def validate(self, path: str) -> None:
        positive(self, path, "eval_seed", zero=True)


class Thor(Router):
    """THOR: every expert is drawn at random, in training per batch, at inference per document; gate 1."""

    Config = ThorConfig
    requires = ("positions", "key")
    provides = ()

    def __init__(self, config: ThorConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        """Raises ValueError in training without a key: every step would draw the same."""
        key, granularity = self._key(ctx), self.config.granularity if ctx.train else self.config.eval_granularity
        experts_T1 = draw(key, granularity, self.num_experts, ctx)[:, None]
        return Routing(TokenChoice(experts_T1, jnp.ones(experts_T1.shape, jnp.float32), self.num_experts))

    def _key(self, ctx: RoutingContext) -> Array:
        """Of this layer: a key that is given is the layer's own already."""
        if ctx.train:
            if ctx.key is None:
                raise ValueError("router 'thor' draws experts: training needs a key, got none")
            return ctx.key
        layer = 0 if ctx.layer is None else ctx.layer
        key = jax.random.fold_in(jax.random.key(0), layer) if ctx.key is None else ctx.key
        return jax.random.fold_in(key, self.config.eval_seed)

    def max_active(self) -> int:
        return 1

    def flops_per_token(self, hidden_size: int) -> float:
        return 0


def draw(key: Array, granularity: Granularity, num_experts: int, ctx: RoutingContext) -> Int[Array, "T"]:
    """The expert of every token. Draws are by name (row, document, position), so it does not matter how many tokens are
    drawn for at once.
    """
    T = ctx.batch * ctx.seq
    one = lambda key: jax.random.randint(key, (), 0, num_experts, jnp.int32)
    if granularity == "batch":
        return jnp.broadcast_to(one(key), T)
    return jax.vmap(one)(keys_by_place(key, ctx, each_token=granularity == "token"))
