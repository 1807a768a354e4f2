"""GShard's top-2 gating (Lepikhin et al., arXiv 2006.16668, algorithm 1): the second expert by chance.

    P = softmax(x W);  g_1, g_2 = the two largest of P, divided by their sum
    the second choice is dispatched with probability min(1, g_2 / threshold), threshold 1/2:  2 g_2 > Uniform(0, 1)

A weak second choice is thus often skipped in training and takes no place of its expert; its gate is not given to the
first. Without training both are taken. The capacity dispatcher places all first choices before any second one; the
loss is `load_balance` with choices="first". ST-MoE (arXiv 2202.08906): threshold 0.2 and the z-loss.

NLLB (arXiv 2207.04672, after fairseq and transformers) masks what experts return, and its gates are divided by the sum
of those that found a place: the router has to know the places, so it gives them out itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as ops
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import Dims, Router, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class NllbConfig:
    """What NLLB adds. `expert_capacity`: places per expert in the whole batch; 0: as many as are wanted. Outside
    training there are `eval_capacity_fraction` of all tokens, if that is positive. First choices come before second
    ones, of each those of earlier tokens, or with `batch_prioritized` of tokens with larger probabilities.
    `normalize_before_dropping`: the gate of a choice without a place is lost, else it goes to the other one.

    `sampled_second`: in training the second expert is drawn in proportion to its probability. `output_masking` p: in
    training what experts return to a token is 0 with probability p, otherwise all is multiplied by 1 - p.
    """

    expert_capacity: int = 0
    eval_capacity_fraction: float = 1.0
    batch_prioritized: bool = False
    normalize_before_dropping: bool = False
    sampled_second: bool = False
    output_masking: float = 0.0

    def validate(self, path: str) -> None:
        positive(self, path, "expert_capacity", zero=True)
        if not 0 <= self.output_masking < 1:
            raise ConfigError(f"{join(path, 'output_masking')}: expected a number in [0, 1), got {self.output_masking}")

    def capacity(self, T: int, train: bool) -> int:
        """Places per expert for T tokens; with T nothing is dropped, as a token takes an expert once."""
        if not self.expert_capacity:
            return T
        fraction = self.eval_capacity_fraction
        return min(T, self.expert_capacity if train or fraction <= 0 else math.ceil(fraction * T))


@dataclasses.dataclass(frozen=True)
class GShardConfig:
    """`second_threshold`: from this gate on the second expert is always taken, below in proportion (0: always)."""

    second_threshold: float = 0.5
    init_std: float = 0.02
    nllb: NllbConfig = dataclasses.field(default_factory=NllbConfig, metadata={"silent": True})

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
        if config.nllb.expert_capacity and not config.nllb.eval_capacity_fraction >= 1:
            self.causal = False  # second choices come after the first ones of all tokens

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        experts_TK = select(probs_TE, self.max_active(), ctx.inputs.get("router_bias"))
        if self.config.nllb.sampled_second and ctx.train:
            experts_TK = self._draw_second(logits_TE, experts_TK, ctx)
        gates_TK = gather_gates(probs_TE, experts_TK)
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + 1e-9)
        threshold = self.config.second_threshold
        if ctx.train and threshold:
            draw_T = jax.random.uniform(ctx.key, gates_TK.shape[:1], gates_TK.dtype)
            rank_K = jnp.arange(self.max_active())
            kept_TK = (rank_K == 0) | (draw_T[:, None] * threshold < gates_TK)
            experts_TK = jnp.where(kept_TK, experts_TK, self.num_experts)
            gates_TK = jnp.where(kept_TK, gates_TK, 0)
        experts_TK, gates_TK = self._with_places(experts_TK, gates_TK, probs_TE, ctx)
        gates_TK = self._masked(gates_TK, ctx)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, probs_TE)

    def _draw_second(self, logits_TE, experts_TK, ctx: RoutingContext) -> Int[Array, "T K"]:
        noise_TE = jax.random.gumbel(jax.random.fold_in(ctx.key, 1), logits_TE.shape, logits_TE.dtype)
        is_first_TE = experts_TK[:, :1] == jnp.arange(self.num_experts)
        second_T = jnp.argmax(jnp.where(is_first_TE, -jnp.inf, logits_TE + noise_TE), -1).astype(jnp.int32)
        return experts_TK.at[:, 1:].set(second_T[:, None])

    def _with_places(self, experts_TK, gates_TK, probs_TE, ctx: RoutingContext):
        """(experts, gates) of the choices that find a place; the others go nowhere."""
        c, (T, _), E = self.config.nllb, experts_TK.shape, self.num_experts
        C = c.capacity(T, ctx.train)
        if C < T:
            if ctx.valid is not None:
                experts_TK = jnp.where(ctx.valid[:, None], experts_TK, E)
            order_T = jnp.arange(T)
            if c.batch_prioritized:
                order_T = jnp.argsort(-jax.lax.stop_gradient(probs_TE).max(-1), stable=True)
            place_TK = ops.expert_positions(experts_TK[order_T], E, priority="choice")[1]
            place_TK = jnp.zeros_like(place_TK).at[order_T].set(place_TK, unique_indices=True)
            kept_TK = (place_TK < C) & (experts_TK < E)
            experts_TK, gates_TK = jnp.where(kept_TK, experts_TK, E), jnp.where(kept_TK, gates_TK, 0)
        if c.expert_capacity and not c.normalize_before_dropping:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + 1e-9)
        return experts_TK, gates_TK

    def _masked(self, gates_TK, ctx: RoutingContext) -> Float[Array, "T K"]:
        p = self.config.nllb.output_masking
        if not p:
            return gates_TK
        if not ctx.train:
            return gates_TK * (1 - p)
        kept_T = jax.random.bernoulli(jax.random.fold_in(ctx.key, 2), 1 - p, gates_TK.shape[:1])
        return jnp.where(kept_T[:, None], gates_TK, 0)

    def max_active(self) -> int:
        return min(2, self.num_experts)
