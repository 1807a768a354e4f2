"""Noisy top-k gating (Shazeer et al., arXiv 1701.06538): learned noise before the choice, and a smooth load.

    H = x W_g + N(0, 1) * (softplus(x W_noise) + eps);  experts = TopK(H, K);  gates = softmax over the K selected of H
    p_te = Phi( ((x W_g)_te - k-th largest of H_t without e) / scale_te )

p is the chance that e would be among the K if only its own noise were drawn again: unlike a count it has a gradient.
Its sum over tokens is the term `expected_load`, for the loss of that name. Without training there is no noise, and the
load is the count.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Constant, Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, check_experts_per_tok, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class NoisyTopKConfig:
    """`noise_epsilon`: least standard deviation of the noise (0.01, in the code only). `init_std` of W_g; the paper
    starts both matrices at zero, so that the noise alone routes at first.
    """

    num_experts_per_tok: int = 2
    noise_epsilon: float = 0.01
    init_std: float = 0.0

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "noise_epsilon")
        positive(self, path, "init_std", zero=True)

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class NoisyTopK(Router):
    """Top-k of logits with learned Gaussian noise, softmax over the chosen, balanced by importance and smooth load."""

    Config = NoisyTopKConfig
    provides = ("logits", "probs", "expected_load")
    requires = ("key",)
    cost = CostBound(14, 5, "a normal random number and its distribution function for every token and expert")

    def __init__(self, config: NoisyTopKConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        shape, axes = (dims.hidden_size, dims.num_experts), ("embed", "expert_logits")
        self.kernel = param(shape, axes, Normal(config.init_std))
        self.noise_kernel = param(shape, axes, Constant(0.0))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        K, E = self.config.num_experts_per_tok, self.num_experts
        clean_TE = noisy_TE = linear_logits(x_TD, self.kernel[...])
        bias_E = ctx.inputs.get("router_bias", jnp.zeros(E, clean_TE.dtype))
        if ctx.train:
            scale_TE = jax.nn.softplus(linear_logits(x_TD, self.noise_kernel[...])) + self.config.noise_epsilon
            noisy_TE = clean_TE + jax.random.normal(ctx.key, clean_TE.shape, clean_TE.dtype) * scale_TE
        # the one after the K chosen is what a chosen one must beat
        ranked_TJ = select(noisy_TE, min(K + 1, E), bias_E)
        experts_TK = ranked_TJ[:, :K]
        gates_TK = jax.nn.softmax(gather_gates(noisy_TE, experts_TK))
        hit_TE = (experts_TK[..., None] == jnp.arange(E)).any(1)
        if ctx.train and K < E:
            load_TE = chance(clean_TE + bias_E, gather_gates(noisy_TE + bias_E, ranked_TJ), hit_TE, scale_TE)
        else:
            load_TE = hit_TE.astype(clean_TE.dtype)
        if ctx.valid is not None:
            load_TE = jnp.where(ctx.valid[:, None], load_TE, 0)
        aux = Aux(terms={"expected_load": load_TE.sum(0)})
        return Routing(TokenChoice(experts_TK, gates_TK, E), noisy_TE, jax.nn.softmax(noisy_TE), aux=aux)

    def max_active(self) -> int:
        return self.config.num_experts_per_tok

    def flops_per_token(self, hidden_size: int) -> float:
        """Two matrices, as in training."""
        return 4 * hidden_size * self.num_experts


def chance(
    clean_TE: Float[Array, "T E"], best_TJ: Float[Array, "T J"], hit_TE, scale_TE: Float[Array, "T E"]
) -> Float[Array, "T E"]:
    """The chance of each expert to be among the K = J - 1, drawn anew; `best`: the J largest noisy logits."""
    threshold_TE = jnp.where(hit_TE, best_TJ[:, -1:], best_TJ[:, -2:-1])
    return jax.scipy.stats.norm.cdf((clean_TE - threshold_TE) / scale_TE)
