"""Duo-LLM's router (arXiv 2410.10846, its third stage): which of a layer's networks a token takes, under one budget.

    p = softmax(tau x W)
    training:   y = sum_e p_e E_e(x)                    a soft mixture: every network computes every token
    inference:  y = E_e(x), e = argmax x W              gate 1: no probability weighs what is computed

tau rises over training, so that the mixture hardens towards what inference does. What the big networks may take is
said of all layers and tokens together, by the objective `global_budget`, for which the probability of expert 0 is a
term here; no loss speaks of one layer, so layers may take different shares. The networks come from a first stage in
which tokens draw them (router `thor`, a draw per token) and are usually kept: `train.freeze`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.router import CostBound, Dims, Router, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class DuoLLMConfig:
    """tau goes from `temperature` to `final_temperature` over `total_steps`, by the same factor every step. (The paper
    says that it rises, not from where to where.)
    """

    temperature: float = 1.0
    final_temperature: float = 10.0
    total_steps: int = 300
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "temperature", "final_temperature", "total_steps", "init_std")


class DuoLLM(Router):
    """Duo-LLM: a soft mixture of all experts in training, the likeliest one at inference; one budget for all layers."""

    Config = DuoLLMConfig
    decision = Dense
    requires = ("step",)
    retrofits = True
    cost = CostBound(moved=5.5, why="in training all experts of a token are live: T E compete for the budget's rows")

    def __init__(self, config: DuoLLMConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        """A Dense decision in training, else a TokenChoice of one expert."""
        logits_TE = linear_logits(x_TD, self.kernel[...])
        if not ctx.train:
            experts_T1 = select(logits_TE, 1, ctx.inputs.get("router_bias"))
            choice = TokenChoice(experts_T1, jnp.ones(experts_T1.shape, logits_TE.dtype), self.num_experts)
            stats = {"big_share": self._share((experts_T1[:, 0] == 0).astype(jnp.float32), ctx)}
            return Routing(choice, logits_TE, jax.nn.softmax(logits_TE), aux=Aux(stats=stats))
        probs_TE = jax.nn.softmax(self.temperature(ctx.step) * logits_TE)
        share = self._share(probs_TE[:, 0], ctx)
        aux = Aux(terms={"budget": share}, stats={"big_share": jax.lax.stop_gradient(share)})
        return Routing(Dense(probs_TE), logits_TE, probs_TE, aux=aux)

    def temperature(self, step) -> Float[Array, ""]:
        """tau at a step of training."""
        first, last = self.config.temperature, self.config.final_temperature
        return first * (last / first) ** jnp.clip(step / self.config.total_steps, 0, 1)

    def _share(self, big_T: Float[Array, "T"], ctx: RoutingContext) -> Stat:
        valid_T = jnp.ones_like(big_T) if ctx.valid is None else ctx.valid.astype(big_T.dtype)
        return Stat.mean((big_T * valid_T).sum(), valid_T.sum())

    def rows_per_token(self, seq_len: int) -> float:
        """In training every token has all experts."""
        return self.num_experts

    def active(self) -> float:
        return 1
