"""SparseMixer (arXiv 2310.00811, 2409.12136; routes Phi-3.5-MoE): one expert after the other, each its own softmax.

    near(z) = z where (max z - z) / max(|z|, max z) <= 2 eps, else -inf          (eps: `jitter_eps`)
    pick k:  p = softmax(near(z without the earlier picks));  e = argmax;  gate = p_e

So gates come from different softmaxes and do not sum to 1: where the best expert is clearly ahead, its gate is 1. In
training e is sampled from p, and a gate whose e is not the most likely one counts a third, three times out of four:
Heun's third-order rule for the gradient through the choice. The gradient itself is that of p_e.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, check_experts_per_tok, linear_logits


@dataclasses.dataclass(frozen=True)
class SparseMixerConfig:
    """`jitter_eps`: experts within 2 eps of the best, relatively, take part in its softmax and may be sampled."""

    num_experts_per_tok: int = 2
    jitter_eps: float = 0.01
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "init_std")
        positive(self, path, "jitter_eps", zero=True)

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class SparseMixer(Router):
    """Expert after expert, each from its own softmax over the near-best; sampled in training, with Heun's rule."""

    Config = SparseMixerConfig
    requires = ("key",)
    cost = CostBound(9, 3.5, "a random number for every token and expert, at each of K picks")

    def __init__(self, config: SparseMixerConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        steer_E = ctx.inputs.get("router_bias", 0.0)
        free_TE = jnp.ones(logits_TE.shape, bool)
        experts, gates = [], []
        for k in range(self.config.num_experts_per_tok):
            key = jax.random.fold_in(ctx.key, k) if ctx.train else None
            expert_T, gate_T = pick(logits_TE + steer_E, free_TE, self.config.jitter_eps, key)
            free_TE &= expert_T[:, None] != jnp.arange(self.num_experts)
            experts.append(expert_T)
            gates.append(gate_T)
        choice = TokenChoice(jnp.stack(experts, -1).astype(jnp.int32), jnp.stack(gates, -1), self.num_experts)
        return Routing(choice, logits_TE, jax.nn.softmax(logits_TE))

    def max_active(self) -> int:
        return self.config.num_experts_per_tok


def pick(logits_TE: Float[Array, "T E"], free_TE, eps: float, key=None):
    """(expert [T], gate [T]) among the free experts; sampled with a `key`."""
    z_TE = jax.lax.stop_gradient(logits_TE)
    best_T1 = jnp.where(free_TE, z_TE, -jnp.inf).max(-1, keepdims=True)
    # written as the negation: 0 / 0, all logits zero, keeps an expert
    far_TE = (best_T1 - z_TE) / jnp.maximum(jnp.abs(z_TE), best_T1) > 2 * eps
    near_TE = free_TE & ~far_TE
    kept_TE = jnp.where(near_TE, logits_TE, -jnp.inf)
    probs_TE = jax.nn.softmax(kept_TE)
    best_T = jnp.where(free_TE, z_TE, -jnp.inf).argmax(-1)
    expert_T = best_T if key is None else jax.random.categorical(key, jax.lax.stop_gradient(kept_TE))
    hit_TE = expert_T[:, None] == jnp.arange(logits_TE.shape[-1])
    gate_T = jnp.where(hit_TE, probs_TE, 0).sum(-1)
    if key is not None:
        whole_T = (expert_T == best_T) | (jax.random.uniform(jax.random.fold_in(key, 1), expert_T.shape) > 0.75)
        value_T = jax.lax.stop_gradient(gate_T) * jnp.where(whole_T, 1.0, 1 / 3).astype(gate_T.dtype)
        gate_T = gate_T + jax.lax.stop_gradient(value_T - gate_T)
    return expert_T, gate_T
