"""Top-P routing (Huang et al., arXiv 2403.07652): as many experts as it takes to hold a share p of the probability.

    P = softmax(x W);  s_1 >= s_2 >= ... the sorted P;  rank j is kept where s_1 + ... + s_{j-1} <= p;  gates = P

The expert that crosses p is kept, so there is always one, and gates are not renormalised. A token keeps at most
floor(p E) + 1 experts (uniform P needs that many): this many ranks are static, the rest of them goes nowhere. The loss
`entropy_loss` keeps the router from flattening P to get more experts.

p alone does not fix the mean number of experts, which falls while the router sharpens. With `controller_rate` u > 0 it
is held: p is a buffer per layer that moves after each step by u (target - mean experts per token) / E. (An integral
controller of our own; arXiv 2512.13996 steers p with a proportional part besides.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Buffer, Constant, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import CostBound, Dims, Router, gather_gates, linear_logits


@dataclasses.dataclass(frozen=True)
class TopPConfig:
    """`top_p`: the threshold, or where the controller begins; it never leaves [0, max_top_p].

    `mean_experts`: experts per token on average. It counts active parameters and FLOPs before anything is measured,
    and is what the controller holds (`controller_rate` > 0).
    """

    top_p: float = 0.4
    mean_experts: float = 2.0
    controller_rate: float = 0.0
    max_top_p: float = 1.0
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "init_std")
        positive(self, path, "controller_rate", zero=True)
        for name in ("top_p", "max_top_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{join(path, name)}: expected a number in [0, 1], got {getattr(self, name)}")
        if self.mean_experts < 1:
            raise ConfigError(f"{join(path, 'mean_experts')}: a token has at least 1 expert, got {self.mean_experts}")
        if self.controller_rate and self.top_p > self.max_top_p:
            raise ConfigError(f"{join(path, 'top_p')}: {self.top_p} is above max_top_p={self.max_top_p}")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        if self.controller_rate and self.mean_experts > self.max_active(num_experts):
            raise ConfigError(
                f"{join(path, 'mean_experts')}: {self.mean_experts} cannot be held, a token has at most "
                f"{self.max_active(num_experts)} of num_experts={num_experts} at max_top_p={self.max_top_p}"
            )

    def max_active(self, num_experts: int) -> int:
        """floor(p E) + 1 for the largest p, at most E."""
        p = self.max_top_p if self.controller_rate else self.top_p
        # 0.29 * 100 is 28.999...: the product's own error must not cost a rank
        return min(num_experts, int(p * num_experts + 1e-9) + 1)


class TopP(Router):
    """Each token takes its best experts until their probabilities exceed p: few where the router is sure."""

    Config = TopPConfig
    cost = CostBound(7, 20, "floor(p E) + 1 experts for every token, sorted and moved, while the router is flat")

    def __init__(self, config: TopPConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))
        if config.controller_rate:
            self.top_p = param((), (), Constant(config.top_p), kind=Buffer)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        # a bias from outside shifts the logits that select, so that the bound on the ranks holds with it
        steered_TE = logits_TE + ctx.inputs["router_bias"] if "router_bias" in ctx.inputs else logits_TE
        p = self.top_p[...] if self.config.controller_rate else self.config.top_p
        experts_TK = nucleus(jax.nn.softmax(steered_TE), p, self.max_active())
        aux = Aux(stats={"top_p": Stat.average(jnp.asarray(p, jnp.float32))})
        choice = TokenChoice(experts_TK, gather_gates(probs_TE, experts_TK), self.num_experts)
        return Routing(choice, logits_TE, probs_TE, aux=aux)

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        if not self.config.controller_rate:
            return {}
        missing = (self.config.mean_experts - stats["experts_per_token"].value()) / self.num_experts
        moved = self.top_p[...] + self.config.controller_rate * missing
        return {"top_p": jnp.clip(moved, 0, self.config.max_top_p)}

    def max_active(self) -> int:
        return self.config.max_active(self.num_experts)

    def active(self) -> float:
        return min(self.config.mean_experts, self.max_active())


def nucleus(probs_TE: Float[Array, "T E"], p: Float[Array, ""] | float, K: int):
    """Ids [T, K] of the fewest experts whose probabilities exceed p, best first, then E. At least one. No gradient."""
    E = probs_TE.shape[-1]
    best_TK, experts_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), K)
    # before rank j: shifted and not `cumsum - best`, so that the first is exactly 0 and always kept
    before_TK = jnp.pad(jnp.cumsum(best_TK, -1)[:, :-1], ((0, 0), (1, 0)))
    kept_TK = (before_TK <= p) | (p >= 1)  # at 1 all of them, also where rounding carries the sum past it
    return jnp.where(kept_TK, experts_TK, E).astype(jnp.int32)
