"""Sinkhorn routing (S-BASE in Clark et al., arXiv 2202.01169; the loop and gates of Megatron-LM).

    in training, with M = exp(z), z = x W, and T tokens over E experts:
        d0_t = 1 / (T sum_e M_te d1_e),  d1_e = 1 / (E sum_t M_te d0_t)      `iterations` times, from d1 = 1
        experts = TopK of the plan d0_t M_te d1_e:  every expert holds 1/E of it, every token (in the limit) 1/T
    at inference: experts = TopK(z)
    gates = sigmoid(z) if K = 1, else softmax(z), at the experts chosen; not renormalised

The plan carries no gradient: it only picks, and no balance loss goes with it. NOT causal in training: d1 weighs all
tokens of the group, later ones and other sequences too. At inference a token decides alone, so decoding and evaluation
are causal, and the load is whatever training taught. Megatron iterates until d1 moves by less than 1e-4; here a fixed
number of times, in logarithms, which cannot overflow.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, check_experts_per_tok, gather_gates, linear_logits
from moe_zoo.routing.top_k import select

_OUT = -1e30  # log of nothing: finite, so that a group of padding alone has no inf - inf


@dataclasses.dataclass(frozen=True)
class SinkhornConfig:
    """`iterations` of the plan. `group`: over which tokens load is even, the batch (the paper) or each sequence."""

    num_experts_per_tok: int = 1
    iterations: int = 8
    group: Literal["batch", "sequence"] = "batch"
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "iterations", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class Sinkhorn(Router):
    """Even load by an optimal-transport plan while training (not causal there), top-k of the scores at inference."""

    Config = SinkhornConfig
    cost = CostBound(3.0, 1.5, "in training, eight times two passes of exponentials over all T E logits")

    def __init__(self, config: SinkhornConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        K = self.config.num_experts_per_tok
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        choice_TE, aux = logits_TE, Aux()
        if ctx.train:
            choice_TE, aux = self._plan(jax.lax.stop_gradient(logits_TE), ctx)
        experts_TK = select(choice_TE, K, ctx.inputs.get("router_bias"))
        gates_TK = gather_gates(jax.nn.sigmoid(logits_TE) if K == 1 else probs_TE, experts_TK)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, probs_TE, aux=aux)

    def _plan(self, logits_TE: Float[Array, "T E"], ctx: RoutingContext) -> tuple[Float[Array, "T E"], Aux]:
        """The logarithm of the plan, and how far tokens are from their share of it (the iterations left to do)."""
        G = ctx.batch if self.config.group == "sequence" else 1
        grouped_GTE = logits_TE.reshape(G, -1, self.num_experts)
        valid_GT = jnp.ones(grouped_GTE.shape[:2], bool) if ctx.valid is None else ctx.valid.reshape(G, -1)
        plan_GTE = jax.vmap(lambda z, valid: log_plan(z, valid, self.config.iterations))(grouped_GTE, valid_GT)
        share_GT = jnp.exp(jax.nn.logsumexp(plan_GTE, -1)) * valid_GT.sum(-1, keepdims=True)
        error = jnp.where(valid_GT, jnp.abs(share_GT - 1), 0).sum()
        stats = {"sinkhorn_error": Stat.mean(error, valid_GT.sum().astype(error.dtype))}
        return plan_GTE.reshape(logits_TE.shape), Aux(stats=stats)

    def max_active(self) -> int:
        return self.config.num_experts_per_tok


def log_plan(logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"], iterations: int) -> Float[Array, "T E"]:
    """log(d0_t M_te d1_e): after any number of iterations each expert's valid tokens sum to exactly 1/E."""
    E = logits_TE.shape[-1]
    log_tokens = jnp.log(jnp.maximum(valid_T.sum(), 1).astype(logits_TE.dtype))

    def tokens(column_E):
        row_T = -log_tokens - jax.nn.logsumexp(logits_TE + column_E, axis=1)
        return jnp.where(valid_T, row_T, _OUT)

    def experts(_, column_E):
        return -jnp.log(E) - jax.nn.logsumexp(logits_TE + tokens(column_E)[:, None], axis=0)

    column_E = jax.lax.fori_loop(0, iterations - 1, experts, jnp.zeros(E, logits_TE.dtype))
    row_T = tokens(column_E)
    return logits_TE + row_T[:, None] + experts(0, column_E)
