"""The routed feed-forward layer: router, dispatcher, bank, and what trains the router."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.analysis import sparsity
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Decision, Dense, ExpertChoice, Soft, TokenChoice
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.schema import Choice
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.tap import Tap, below
from moe_zoo.routing.router import Dims


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a routed layer is made of. `shared_size` > 0 adds a shared expert of that width that every token visits, of
    the formula `shared`; `shared_gate` weights it by sigmoid(x w_s) as Qwen2-MoE does. `sum_bias`: one behind the sum
    of experts (JetMoE). `num_heads`, `head_dim`: of the attention below.
    """

    num_experts: int
    intermediate_size: int
    vocab_size: int
    router: Choice
    experts: Choice
    dispatch: Choice
    shared: FeedForwardConfig = FeedForwardConfig()
    losses: tuple[Choice, ...] = ()
    shared_size: int = 0
    shared_gate: bool = False
    sum_bias: bool = False
    num_heads: int = 0
    head_dim: int = 0

    def dims(self, hidden_size: int) -> Dims:
        """What a router is told of the sizes around it."""
        return Dims(self.num_experts, hidden_size, self.vocab_size, self.num_heads, self.head_dim)


class MoE(nnx.Module):
    """y_t = sum_k gate_tk Expert_{e_tk}(x_t) (+ shared expert) (+ copy_t x_t, of a router with zero experts)."""

    def __init__(self, config: MoEConfig, *, hidden_size: int, out_scale: float):
        D, E = hidden_size, config.num_experts
        self.num_experts, self.hidden_size = E, D
        self.router = config.router.make(config.dims(D))
        self.router_name = config.router.name
        self.experts = config.experts.make(
            num_experts=E, hidden_size=D, intermediate_size=config.intermediate_size, out_scale=out_scale
        )
        self.dispatch = config.dispatch.make()
        self.losses = tuple((choice.name, choice.make()) for choice in config.losses)
        if config.shared_size:
            self.shared = MLP(config.shared, hidden_size=D, intermediate_size=config.shared_size, out_scale=out_scale)
        if config.shared_gate:
            self.shared_gate = param((D, 1), ("embed", None), fan_in(D))
        if config.sum_bias:
            self.sum_bias = param((D,), ("embed",), Constant(0.0))

    def __call__(
        self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext, tap: Tap | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, Routing]:
        """Output, Aux, Routing. `tap`: what is made of every linear layer's output in the shared expert."""
        return self.once(self.router, x_BSD, ctx, tap)

    def once(self, router, x_BSD: Float[Array, "B S D"], ctx: RoutingContext, tap: Tap | None = None):
        """The layer with a router that is given: output, Aux, Routing."""
        x_TD = x_BSD.reshape(-1, self.hidden_size)
        with jax.named_scope("router"):
            routing = self._route(router, x_TD, ctx)
        y_TD, moved = self.dispatch(x_TD, routing.decision, self.experts, ctx)
        if hasattr(self, "shared"):
            y_TD = y_TD + self._shared(x_TD, tap)
        if hasattr(self, "sum_bias"):
            y_TD = y_TD + self.sum_bias[...].astype(y_TD.dtype)
        if routing.copy is not None:
            y_TD = y_TD + x_TD * routing.copy[:, None].astype(x_TD.dtype)
        aux = routing.aux | self._losses(routing, ctx) | Aux(stats=moved) | Aux(stats=routing_stats(routing, ctx))
        if ctx.record:
            aux = aux | Aux(terms=recorded(routing))
        return y_TD.reshape(x_BSD.shape), aux, routing

    def _route(self, router, x_TD, ctx: RoutingContext) -> Routing:
        if "given" in ctx.inputs:
            if ctx.cache is not None:
                raise ValueError(
                    f"a given decision leaves router {self.router_name!r} without its memory of the tokens"
                )
            return Routing(ctx.inputs["given"].masked(ctx.valid), carry=ctx.carry)
        routing = router(x_TD, ctx)
        return dataclasses.replace(routing, decision=routing.decision.masked(ctx.valid))

    def _shared(self, x_TD, tap: Tap | None):
        y_TD = self.shared(x_TD, None if tap is None else below("shared", tap))
        if hasattr(self, "shared_gate"):
            y_TD = y_TD * jax.nn.sigmoid(x_TD @ self.shared_gate[...].astype(x_TD.dtype))
        return y_TD

    def _losses(self, routing: Routing, ctx: RoutingContext) -> Aux:
        if "given" in ctx.inputs:  # nothing was routed, so nothing is trained
            return Aux()
        losses, stats = {}, {}
        for name, loss in self.losses:
            raw = loss(routing, ctx)
            losses[name] = loss.config.coef * raw
            stats[name] = Stat.average(jax.lax.stop_gradient(raw))
        return Aux(losses=losses, stats=stats)

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        """Values that follow from the training data, keyed by their path below this layer."""
        return {f"router.{name}": value for name, value in self.router.from_corpus(counts_V, domains).items()}

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New buffer values, keyed by their path below this layer."""
        return {f"router.{name}": value for name, value in self.router.after_step(stats).items()}

    def active(self) -> float:
        """Experts of the bank that one token uses, for counting active parameters."""
        return self.router.active()

    def flops_per_token(self, rows_per_token: float | None = None) -> float:
        """Forward FLOPs of one token: router, expert rows (by default as many as the router says), shared expert."""
        rows = self.router.active() if rows_per_token is None else rows_per_token
        flops = self.router.flops_per_token(self.hidden_size) + rows * self.experts.flops_per_row()
        return flops + (self.shared.flops_per_token() if hasattr(self, "shared") else 0)


def recorded(routing: Routing) -> dict[str, Any]:
    """What was routed where: "router_decision" of whatever type, "router_logits" [T, E] if there are any, and of token
    choice "router_experts", "router_gates" [T, K].
    """
    found = {"router_decision": routing.decision}
    if routing.logits is not None:
        found |= {"router_logits": routing.logits}
    if isinstance(routing.decision, TokenChoice):
        found |= {"router_experts": routing.decision.experts, "router_gates": routing.decision.gates}
    return found


def routing_stats(routing: Routing, ctx: RoutingContext) -> dict[str, Stat]:
    """What every routed layer reports: load per expert, experts per token, router entropy; outside training load per
    domain, and where tokens have experts of their own how sparse that is over neighbours.
    """
    stats = {}
    weight_T = jnp.ones(ctx.batch * ctx.seq, jnp.float32) if ctx.valid is None else ctx.valid.astype(jnp.float32)
    hits_TE = visits(routing.decision, ctx.batch * ctx.seq)
    if hits_TE is not None:
        stats["load"] = Stat.sum(hits_TE.sum(0))
        stats["experts_per_token"] = Stat.mean(hits_TE.sum(), weight_T.sum())
        if ctx.num_domains and ctx.domain is not None:
            # (domains, T) @ (T, E): tokens without a domain (-1) match no row
            domain_XT = (ctx.domain == jnp.arange(ctx.num_domains)[:, None]).astype(jnp.float32)
            stats["load_by_domain"] = Stat.sum(domain_XT @ hits_TE)
        if not ctx.train and not isinstance(routing.decision, Soft):
            stats |= neighbour_stats(hits_TE > 0, ctx)
    if routing.probs is not None:
        probs_TE = jax.lax.stop_gradient(routing.probs)
        entropy_T = -jnp.sum(probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30)), -1)
        stats["entropy"] = Stat.mean(jnp.where(weight_T > 0, entropy_T, 0).sum(), weight_T.sum())
    return stats


def visits(decision: Decision, T: int) -> Float[Array, "T E"] | None:
    """How much of each expert each of T tokens takes: whole visits, or in Soft MoE its share of an expert's slots.

    None where no token goes anywhere.
    """
    if isinstance(decision, TokenChoice):
        return (decision.experts[..., None] == jnp.arange(decision.num_experts)).sum(1).astype(jnp.float32)
    if isinstance(decision, Dense):
        return decision.live().astype(jnp.float32)
    if isinstance(decision, ExpertChoice):
        G, E, C = decision.tokens.shape
        hits_GSE = jnp.zeros((G, T // G + 1, E), jnp.float32)
        groups, experts = jnp.arange(G)[:, None, None], jnp.arange(E)[None, :, None]
        return hits_GSE.at[groups, decision.tokens, experts].add(1.0)[:, :-1].reshape(T, E)
    if isinstance(decision, Soft):
        return jax.lax.stop_gradient(decision.combine.sum(-1).reshape(T, -1))
    return None


def neighbour_stats(active_TE: Bool[Array, "T E"], ctx: RoutingContext) -> dict[str, Stat]:
    """BlockFFN's statistics of sparsity (`analysis.sparsity`); a row that is too short for one does not have it."""
    B, S = ctx.batch, ctx.seq
    active_BSE = active_TE.reshape(B, S, -1)
    valid_BS = jnp.ones((B, S), bool) if ctx.valid is None else ctx.valid.reshape(B, S)
    stats = {"token_level_sparsity": Stat.mean(*sparsity.chunk_sparsity(active_BSE, valid_BS, 1))}
    if S >= sparsity.CHUNK:
        stats["chunk_level_sparsity"] = Stat.mean(*sparsity.chunk_sparsity(active_BSE, valid_BS))
    if S > 1:
        paired_BS = valid_BS[:, :-1] & valid_BS[:, 1:]
        if ctx.segment_ids is not None:
            segments_BS = ctx.segment_ids.reshape(B, S)
            paired_BS &= segments_BS[:, :-1] == segments_BS[:, 1:]
        stats["expert_reuse"] = Stat.mean(*sparsity.reuse(active_BSE, paired_BS))
    return stats
