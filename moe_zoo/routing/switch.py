"""Switch routing (Fedus, Zoph, Shazeer, arXiv 2101.03961).

    P = softmax((x * jitter) W);  e = argmax P;  y = P_e E_e(x)

The gate is the raw probability: renormalised, it would be 1 and the task loss could not reach the router.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import CostBound, Dims, Router, at_least_f32, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """`jitter` eps: in training the router's input is multiplied by Uniform(1 - eps, 1 + eps), elementwise."""

    jitter: float = 0.01
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "init_std")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"{join(path, 'jitter')}: expected a number in [0, 1), got {self.jitter}")


class Switch(Router):
    """Top-1 with the raw probability as gate, and multiplicative jitter on the router input while training."""

    Config = SwitchConfig
    requires = ("key",)
    cost = CostBound(10, 3, "jitter: a random number for every entry of x")

    def __init__(self, config: SwitchConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        eps = self.config.jitter
        if ctx.train and eps:
            x_TD = at_least_f32(x_TD)
            x_TD = x_TD * jax.random.uniform(ctx.key, x_TD.shape, x_TD.dtype, 1 - eps, 1 + eps)
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        experts_T1 = select(probs_TE, 1, ctx.inputs.get("router_bias"))
        gates_T1 = gather_gates(probs_TE, experts_T1)
        return Routing(TokenChoice(experts_T1, gates_T1, self.num_experts), logits_TE, probs_TE)

    def max_active(self) -> int:
        return 1
