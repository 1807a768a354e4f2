"""ReMoE (Wang, Zhu, Chen, arXiv 2412.14711): ReLU instead of top-k and softmax; how many experts act follows from it.

    R = relu(x W)  [T, E];  y = sum_e R_te E_e(x_t)

Fully differentiable. Sparsity comes from a penalty whose coefficient the objective `adaptive_sparsity` steers towards
1 - K/E. The penalty of a layer (equation 9, with load weights) is the term `sparsity`:

    mean_t sum_e f_e R_te,   f_e = E / (K T) * sum_t 1{R_te > 0}   (no gradient);   plain L1 with f = 1
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, check_experts_per_tok, linear_logits


@dataclasses.dataclass(frozen=True)
class ReLUConfig:
    """`num_experts_per_tok` K: the target, active on average. `balanced`: load weights f in the penalty."""

    num_experts_per_tok: float = 2.0
    balanced: bool = True
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class ReLU(Router):
    """ReMoE: relu(x W) gates, a varying number of active experts, sparsity steered by the objective."""

    Config = ReLUConfig
    decision = Dense
    provides = ("logits",)
    cost = CostBound(1.5, 5.5, "all E gates of a token may be live: T E of them compete for the budget's rows")

    def __init__(self, config: ReLUConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        gates_TE = jax.nn.relu(logits_TE)
        terms = {"sparsity": penalty(gates_TE, ctx.valid, self.config.num_experts_per_tok, self.config.balanced)}
        stats = {
            "active_fraction": active_fraction(gates_TE, ctx.valid),
            "target_fraction": Stat.average(jnp.float32(self.config.num_experts_per_tok / self.num_experts)),
        }
        return Routing(Dense(gates_TE), logits_TE, None, aux=Aux(terms=terms, stats=stats))

    def active(self) -> float:
        return self.config.num_experts_per_tok


def penalty(gates_TE, valid_T, K: float, balanced: bool) -> Float[Array, ""]:
    """The load-weighted L1 norm of the gates, averaged over valid tokens."""
    T, E = gates_TE.shape
    weight_T1 = jnp.ones((T, 1), gates_TE.dtype) if valid_T is None else valid_T[:, None].astype(gates_TE.dtype)
    total = jnp.maximum(weight_T1.sum(), 1)
    f_E = jnp.ones(E, gates_TE.dtype)
    if balanced:
        f_E = E / (K * total) * jax.lax.stop_gradient((gates_TE > 0) * weight_T1).sum(0)
    return jnp.sum(f_E * gates_TE * weight_T1) / total


def active_fraction(gates_TE, valid_T) -> Stat:
    """Mean share of experts with a non-zero gate, over valid tokens."""
    T, E = gates_TE.shape
    on_T = (gates_TE != 0).sum(-1).astype(jnp.float32) / E
    weight_T = jnp.ones(T, jnp.float32) if valid_T is None else valid_T.astype(jnp.float32)
    return Stat.mean((on_T * weight_T).sum(), weight_T.sum())
