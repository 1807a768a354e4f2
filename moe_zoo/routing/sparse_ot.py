"""Sparsity-constrained optimal transport (Liu, Puigcerver, Blondel, arXiv 2209.15466), as in google-research/vmoe.

    S = softmax over experts of x W.  The plan Q >= 0 of a group of T tokens and E experts, b = T / E:
        min  -<Q, S> + gamma/2 |Q|^2,   every token sums to 1,  every expert to b and over at most k tokens
    by its semi-dual in alpha [T], `steps` steps of Adam from 0:  minimize  sum_e M(alpha + S_e) - sum_t alpha_t
        column e of Q = b proj(( alpha + S_e ) / (gamma b)),  proj: onto the simplex with at most k non-zeros
        gradient      = Q's token sums - 1
    expert e takes the tokens with Q_te > 0;  gate = S_te;  y_t = sum over the experts that took t of S_te E_e(x_t)

k = ceil(cf T / E). Experts' sums and the k are exact after any number of steps; tokens' sums of 1 are only approached,
so a token may have no expert or several. The plan only picks: gradient reaches the router through S alone, and no loss
goes with it. NOT causal: alpha couples all tokens of the group, so a decoder trained with it can see the future; the
model says so and refuses to generate.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import ExpertChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import positive
from moe_zoo.routing.expert_choice import coverage
from moe_zoo.routing.router import CostBound, Dims, Router, linear_logits

_NEVER = -1e30  # the score of padding: finite, so that a group of padding alone has no inf - inf


@dataclasses.dataclass(frozen=True)
class SparseOTConfig:
    """`capacity_factor` cf: k = ceil(cf T / E). `steps` and `learning_rate` of Adam on the dual, `gamma` the weight of
    the square. `group`: which tokens are shared out together. `fill`: an expert whose plan has fewer than k tokens also
    takes the first ones outside of it, as the authors' dispatcher does.
    """

    capacity_factor: float = 2.0
    steps: int = 20
    learning_rate: float = 1e-2
    gamma: float = 1.0
    group: Literal["batch", "sequence"] = "sequence"
    fill: bool = False
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "capacity_factor", "learning_rate", "gamma", "init_std")
        positive(self, path, "steps", zero=True)


class SparseOT(Router):
    """Experts take the tokens of a transport plan with at most k tokens per expert, softmax gates; not causal."""

    Config = SparseOTConfig
    decision = ExpertChoice
    causal = False
    cost = CostBound(250, 60, "at each of 20 steps every expert's k best of a sequence are sorted")

    def __init__(self, config: SparseOTConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        c = self.config
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        G = ctx.batch if c.group == "sequence" else 1
        S = x_TD.shape[0] // G
        C = min(S, math.ceil(round(c.capacity_factor * S / self.num_experts, 6)))
        valid_GS = jnp.ones((G, S), bool) if ctx.valid is None else ctx.valid.reshape(G, S)
        probs_GES = probs_TE.reshape(G, S, -1).swapaxes(1, 2)

        def plan(sim_ES, valid_S):
            return transport_plan(sim_ES, valid_S, C, c.steps, c.learning_rate, c.gamma)

        plan_GES = jax.vmap(plan)(jax.lax.stop_gradient(probs_GES), valid_GS)
        mass_GEC, tokens_GEC = jax.lax.top_k(jnp.where(valid_GS[:, None], plan_GES, -1.0), C)
        taken_GEC = mass_GEC >= 0 if c.fill else mass_GEC > 0
        gates_GEC = jnp.where(taken_GEC, jnp.take_along_axis(probs_GES, tokens_GEC, axis=-1), 0)
        decision = ExpertChoice(jnp.where(taken_GEC, tokens_GEC, S).astype(jnp.int32), gates_GEC)
        error = jnp.where(valid_GS, jnp.abs(plan_GES.sum(1) - 1), 0).sum()
        stats = coverage(decision, S, ctx) | {"plan_error": Stat.mean(error, valid_GS.sum().astype(error.dtype))}
        return Routing(decision, logits_TE, probs_TE, aux=Aux(stats=stats))

    def active(self) -> float:
        return min(self.config.capacity_factor, self.num_experts)


def transport_plan(
    sim_ES: Float[Array, "E S"], valid_S: Bool[Array, "S"], k: int, steps: int, rate: float, gamma: float
) -> Float[Array, "E S"]:
    """Q after `steps` Adam steps on the semi-dual: rows sum to b = valid tokens / E and have at most k non-zeros."""
    b = jnp.maximum(valid_S.sum(), 1).astype(sim_ES.dtype) / sim_ES.shape[0]
    adam = optax.scale_by_adam()

    def plan(alpha_S):
        scores_ES = jnp.where(valid_S, alpha_S + sim_ES, _NEVER)
        return jnp.where(valid_S, b * sparse_simplex(scores_ES / (gamma * b), k), 0)

    def step(_, carry):
        alpha_S, moments = carry
        gradient_S = plan(alpha_S).sum(0) - valid_S
        update_S, moments = adam.update(gradient_S, moments)
        return alpha_S - rate * update_S, moments

    zero_S = jnp.zeros(sim_ES.shape[1], sim_ES.dtype)
    return plan(jax.lax.fori_loop(0, steps, step, (zero_S, adam.init(zero_S)))[0])


def sparse_simplex(scores_ES: Float[Array, "E S"], k: int) -> Float[Array, "E S"]:
    """Each row's nearest point of {p >= 0, sum p = 1, at most k non-zeros}: its k largest entries, minus a threshold
    that makes what stays positive sum to 1. Ties go to the lower id.
    """
    # comparing all scores with the k-th would spare the scatter, but a compiler that computes them twice rounds twice
    top_EK, ids_EK = jax.lax.top_k(scores_ES, k)
    top_EK = top_EK - top_EK[:, :1]  # shifting a row changes nothing, and small numbers round less
    excess_EK = jnp.cumsum(top_EK, axis=-1) - 1
    positive_E1 = (top_EK * jnp.arange(1, k + 1) > excess_EK).sum(-1, keepdims=True)
    threshold_E1 = jnp.take_along_axis(excess_EK, positive_E1 - 1, axis=-1) / positive_E1
    p_EK = jnp.maximum(top_EK - threshold_E1, 0)
    return jnp.zeros_like(scores_ES).at[jnp.arange(len(scores_ES))[:, None], ids_EK].set(p_EK)
