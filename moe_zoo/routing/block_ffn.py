"""BlockFFN's router (Song et al., arXiv 2507.08771): ReLU decides the pattern, RMSNorm the magnitude.

    A0 = x W;  A1 = relu(A0);  Ahat = A1 / rms(A1) over all E entries, zeros included;  A = w * Ahat
    y = sum_e A_te E_e(x_t)

The pattern of active experts is that of A1, so it is free of the magnitudes, which the norm settles (||A||_2 = sqrt(E)
at w = 1). Many small experts without a gate branch. No balance loss: the losses `locality` (on A0) and
`chunk_sparsity` (on Ahat over its sum, which this router reports as its probabilities) make neighbouring tokens share
a few experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense
from moe_zoo.core.param import Constant, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.relu import active_fraction
from moe_zoo.routing.router import CostBound, Dims, Router, at_least_f32, linear_logits


@dataclasses.dataclass(frozen=True)
class BlockFFNConfig:
    """`expected_active`: experts per token for active parameters and FLOPs before anything is measured; what really
    comes out is set by the losses.
    """

    expected_active: float = 2.0
    eps: float = 1e-5
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "expected_active", "eps", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        if self.expected_active > num_experts:
            raise ConfigError(
                f"{join(path, 'expected_active')}: {self.expected_active} of num_experts={num_experts}; "
                f"at most {num_experts}"
            )


class BlockFFN(Router):
    """BlockFFN: relu gates normalised over the experts, sparsity by locality and chunk losses."""

    Config = BlockFFNConfig
    decision = Dense
    cost = CostBound(1.5, 5.5, "all E gates of a token may be live: T E of them compete for the budget's rows")

    def __init__(self, config: BlockFFNConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))
        self.scale = param((dims.num_experts,), ("expert_logits",), Constant(1.0))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        on_TE = jax.nn.relu(logits_TE)
        normed_TE = on_TE * jax.lax.rsqrt(jnp.mean(on_TE * on_TE, -1, keepdims=True) + self.config.eps)
        share_TE = normed_TE / (normed_TE.sum(-1, keepdims=True) + 1e-5)
        gates_TE = normed_TE * at_least_f32(self.scale[...])
        aux = Aux(stats={"active_fraction": active_fraction(gates_TE, ctx.valid)})
        return Routing(Dense(gates_TE), logits_TE, share_TE, aux=aux)

    def active(self) -> float:
        return self.config.expected_active
