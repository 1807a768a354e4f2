"""GShard's top-2 gating (Lepikhin et al., arXiv 2006.16668, algorithm 1): the second expert by chance.

    P = softmax(x W);  g_1, g_2 = the two largest of P, divided by their sum
    the second choice is dispatched with probability min(1, g_2 / threshold), threshold 1/2:  2 g_2 > Uniform(0, 1)

A weak second choice is thus often skipped in training and takes no place of its expert; its gate is not given to the
first. Without training both are taken. The capacity dispatcher places all first choices before any second one; the
loss is `load_balance` with choices="first". ST-MoE (arXiv 2202.08906): threshold 0.2 and the z-loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import Dims, Router, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class GShardConfig:
    """`second_threshold`: from this gate on the second expert is always taken, below in proportion (0: always)."""

    second_threshold: float = 0.5
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "init_std")
        positive(self, path, "second_threshold", zero=True)


class GShard(Router):
    """Top-2 with renormalised gates; in training a weak second expert is skipped at random."""

    Config = GShardConfig
    requires = ("key",)

    def __init__(self, config: GShardConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        experts_TK = select(probs_TE, self.max_active(), ctx.inputs.get("router_bias"))
        gates_TK = gather_gates(probs_TE, experts_TK)
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + 1e-9)
        threshold = self.config.second_threshold
        if ctx.train and threshold:
            draw_T = jax.random.uniform(ctx.key, gates_TK.shape[:1], gates_TK.dtype)
            rank_K = jnp.arange(self.max_active())
            kept_TK = (rank_K == 0) | (draw_T[:, None] * threshold < gates_TK)
            experts_TK = jnp.where(kept_TK, experts_TK, self.num_experts)
            gates_TK = jnp.where(kept_TK, gates_TK, 0)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, probs_TE)

    def max_active(self) -> int:
        return min(2, self.num_experts)
