"""Routing with a graph of tokens (Nguyen et al., arXiv 2505.00792): similar tokens go to the same experts.

    e_j = softmax(x_j W)                     what token j would choose by itself
    p_i = sum_j w_ij e_j                     j: the valid tokens of i's document up to i;  rows of w sum to 1
    experts = TopK(p_i);  gates = p_i[experts] (/ sum);  experts see x_i, never a mixture

    similarity_aware   w_ij = softmax_j (x_i^T W_s x_j / tau)
    attention_aware    w_ij ~ A_ij exp(-|u_i - m_j|^2 / (2 s_i^2)),   s_i^2 = sigma^2 sum_j A_ij |u_i - m_j|^2
                       A: one head of the attention below; u: its output before the residual, all heads together;
                       m_j = N v_j W_o, this head's output if it saw j alone (N heads, so that u is the mean of theirs)

The second is a posterior: a head looked at j and u_i is m_j with normal noise; which j was it? Gradients reach W
through every e_j, W_s and the attention through w (`detach_weights` cuts that). Our reading: no code was released.
w never exists for more than a block of queries, and the backward pass makes it again: p is attention with a token's e
as its value, and the squared distance is a dot product, u_i m_j - |m_j|^2 / 2, and a term of i alone that the softmax
drops.

B batch, S tokens of this call, L tokens they may see, N query heads, M key-value heads, H, V head sizes.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import AttentionView, Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Buffer, Constant, Identity, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.core.sight import Sight
from moe_zoo.layers.attend import attend
from moe_zoo.routing.router import (
    CostBound,
    Dims,
    Router,
    at_least_f32,
    check_experts_per_tok,
    gather_gates,
    linear_logits,
)
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class TokenGraphConfig:
    """What both have. `detach_weights`: no gradient through w."""

    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    detach_weights: bool = False
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "init_std")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)


class TokenGraph(Router):
    """Top-k of a mixture of the distributions of earlier tokens; a subclass says how they are weighed."""

    def __init__(self, config: TokenGraphConfig, dims: Dims):
        self.config, self.num_experts, self.dims = config, dims.num_experts, dims
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))

    def alone(self, x_TD, ctx: RoutingContext) -> tuple[Float[Array, "T E"], Float[Array, "B S E"]]:
        """Logits, and what every token would choose by itself."""
        logits_TE = linear_logits(x_TD, self.kernel[...])
        return logits_TE, jax.nn.softmax(logits_TE).reshape(ctx.batch, ctx.seq, self.num_experts)

    def decide(self, mixed_BSE, logits_TE, ctx: RoutingContext, cache, aux: Aux = Aux()) -> Routing:
        """The k largest entries of the mixture."""
        probs_TE = mixed_BSE.reshape(-1, self.num_experts)
        experts_TK = select(probs_TE, self.config.num_experts_per_tok, ctx.inputs.get("router_bias"))
        gates_TK = gather_gates(probs_TE, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdims=True)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, probs_TE, cache=cache, aux=aux)

    def mix(self, query_BSH, key_BLH, value_BLE, sight: Sight, *, window=None, scale=1.0, but=None):
        """sum_j w_ij value_j, w_i = softmax_j(query_i key_j scale) over what i sees and itself.

        `but(queries, keys)`: of other tokens, only those where this is True.
        """
        if self.config.detach_weights:
            query_BSH, key_BLH = jax.lax.stop_gradient((query_BSH, key_BLH))

        def block(queries, keys, query_BSH, key_BLH, value_BLE):
            mask = sight.mask(queries, keys, window)
            mask = (mask if but is None else mask & but(queries, keys)) | sight.itself(queries, keys)
            q, k, v = query_BSH[:, None, queries], key_BLH[:, None, keys], value_BLE[:, None, keys]
            return attend(q, k, v, mask, scale)[:, 0]

        remade = lambda *cut: jax.checkpoint(functools.partial(block, *cut))
        parts = [remade(*cut)(query_BSH, key_BLH, value_BLE) for cut in sight.blocks()]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def max_active(self) -> int:
        return self.config.num_experts_per_tok


# ---------------------------------------------------------------------------------------------------- similarity-aware


@dataclasses.dataclass(frozen=True)
class SimilarityAwareConfig(TokenGraphConfig):
    """`tau` None: sqrt(D). W_s starts as `similarity_init` times the identity. `weights` "uniform": the control, in
    which all that are seen weigh the same. `window` w: only a token itself and the w - 1 positions before it; 1 is
    plain top-k. `informants` "more_certain": of others, only those whose own distribution has no more entropy, as the
    paper's theory assumes; in practice it takes all.
    """

    weights: Literal["similarity", "uniform"] = "similarity"
    tau: float | None = None
    window: int | None = None
    informants: Literal["all", "more_certain"] = "all"
    similarity_init: float = 1.0

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "tau", "window")
        if self.weights == "uniform" and self.tau is not None:
            raise ConfigError(f"{join(path, 'tau')}: {self.tau} needs weights='similarity'")


class SimilarityAware(TokenGraph):
    """Tokens mix the router's distributions of earlier tokens by a learned similarity, then take the k best experts."""

    Config = SimilarityAwareConfig
    cost = CostBound(15, 3.5, "x W_s, and attention of width D over all earlier tokens")

    def __init__(self, config: SimilarityAwareConfig, dims: Dims):
        super().__init__(config, dims)
        if config.weights == "similarity":
            D = dims.hidden_size
            self.similarity = param((D, D), ("embed", None), Identity(config.similarity_init))

    def init_cache(self, batch: int, max_seq: int) -> dict:
        """What earlier tokens are compared by, what they would choose, and who they are."""
        D = self.dims.hidden_size if self.config.weights == "similarity" else 1
        return {
            "keys": jnp.zeros((batch, max_seq, D), jnp.float32),
            "alone": jnp.zeros((batch, max_seq, self.num_experts), jnp.float32),
            "positions": jnp.zeros((batch, max_seq), jnp.int32),
            "valid": jnp.zeros((batch, max_seq), bool),
        }

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        c = self.config
        logits_TE, alone_BSE = self.alone(x_TD, ctx)
        x_BSD = at_least_f32(x_TD).reshape(ctx.batch, ctx.seq, -1)
        if c.weights == "similarity":
            query_BSD = x_BSD @ at_least_f32(self.similarity[...])
        else:
            query_BSD = x_BSD = jnp.zeros_like(x_BSD[..., :1])
        sight, keys_BLD, alone_BLE, cache = seen(x_BSD, alone_BSE, ctx)
        but = None
        if c.informants == "more_certain":
            mine_BS, theirs_BL = entropy(alone_BSE), entropy(alone_BLE)
            but = lambda queries, keys: theirs_BL[:, None, keys] <= mine_BS[:, queries, None]
        scale = 1 / math.sqrt(self.dims.hidden_size) if c.tau is None else 1 / c.tau
        mixed_BSE = self.mix(query_BSD, keys_BLD, alone_BLE, sight, window=c.window, scale=scale, but=but)
        return self.decide(mixed_BSE, logits_TE, ctx, cache)

    def flops_per_token(self, hidden_size: int) -> float:
        """Logits and x W_s."""
        return 2 * hidden_size * (self.num_experts + (hidden_size if self.config.weights == "similarity" else 0))

    def context_flops(self, context: float) -> float:
        """A similarity with each token that is seen, and the sum of their distributions."""
        width = self.dims.hidden_size if self.config.weights == "similarity" else 0
        return 2 * (width + self.num_experts) * min(context, self.config.window or context)


def seen(keys_BSD, alone_BSE, ctx: RoutingContext):
    """(who sees whom, keys and distributions of all that may be seen, the cache with these tokens added)."""
    shape = ctx.batch, ctx.seq
    row = lambda x, default: jnp.broadcast_to(default, shape) if x is None else x.reshape(shape)
    positions_BS, valid_BS = row(ctx.positions, jnp.arange(ctx.seq)), row(ctx.valid, jnp.array(True))
    if ctx.cache is None:
        segments_BS = None if ctx.segment_ids is None else ctx.segment_ids.reshape(shape)
        return Sight(positions_BS, positions_BS, segments_BS, valid_BS), keys_BSD, alone_BSE, None
    new = {"keys": keys_BSD, "alone": alone_BSE, "positions": positions_BS, "valid": valid_BS}
    cache = {name: written(old, new[name], ctx) for name, old in ctx.cache.items()}
    return Sight(positions_BS, cache["positions"], None, cache["valid"], ctx.at), cache["keys"], cache["alone"], cache


def written(old_BL, new_BS, ctx: RoutingContext):
    """The cached array with this call's tokens in their places."""
    return jax.lax.dynamic_update_slice_in_dim(old_BL, new_BS.astype(old_BL.dtype), ctx.at, 1)


def entropy(probs: Float[Array, "... E"]) -> Float[Array, "..."]:
    """In nats."""
    return -jnp.sum(probs * jnp.log(jnp.maximum(probs, 1e-30)), -1)


# ----------------------------------------------------------------------------------------------------- attention-aware


@dataclasses.dataclass(frozen=True)
class AttentionAwareConfig(TokenGraphConfig):
    """`sigma`: the noise, 1 being the size of what a head's row leaves unexplained on average; large: w = A.

    `head` None: the one whose rows have the least entropy on average, by a running mean over steps (`head_decay`) that
    is the layer's state: the same head in training and afterwards, and none that is picked by later tokens.
    """

    sigma: float = 1.0
    head: int | None = None
    head_decay: float = 0.99

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "sigma")
        if not 0 <= self.head_decay < 1:
            raise ConfigError(f"{join(path, 'head_decay')}: expected a number in [0, 1), got {self.head_decay}")


class AttentionAware(TokenGraph):
    """Tokens mix the router's distributions of those that a head of the attention below has taken them from."""

    Config = AttentionAwareConfig
    requires = ("attention",)
    cost = CostBound(15, 3.5, "two passes of an attention head over all earlier tokens")

    def __init__(self, config: AttentionAwareConfig, dims: Dims):
        super().__init__(config, dims)
        N = dims.num_heads
        if config.head is not None and not 0 <= config.head < N:
            raise ConfigError(f"model.router.head: {config.head} of num_attention_heads={N}; at most {N - 1}")
        if config.head is None:
            self.row_entropy = param((N,), (None,), Constant(0.0), kind=Buffer)

    def init_cache(self, batch: int, max_seq: int) -> dict:
        """What earlier tokens would choose; the attention's cache has the rest."""
        return {"alone": jnp.zeros((batch, max_seq, self.num_experts), jnp.float32)}

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        view, cache, aux = ctx.attention, None, Aux()
        logits_TE, alone_BLE = self.alone(x_TD, ctx)
        if ctx.cache is not None:
            cache = {"alone": written(ctx.cache["alone"], alone_BLE, ctx)}
            alone_BLE = cache["alone"]
        query_BSX, key_BLX = self.posterior(view)
        mixed_BSE = self.mix(query_BSX, key_BLX, alone_BLE, view.sight, window=view.window)
        if ctx.train and self.config.head is None:
            aux = Aux(stats={"row_entropy": row_entropy(jax.lax.stop_gradient(view))})
        return self.decide(mixed_BSE, logits_TE, ctx, cache, aux)

    def posterior(self, view: AttentionView) -> tuple[Float[Array, "B S X"], Float[Array, "B L X"]]:
        """Queries and keys whose softmax is w: the head's own, the head's values, |m|^2."""
        q_BSH, k_BLH, v_BLV, o_VD = self._head(view)
        out_BSD = at_least_f32(view.out)
        toward_BSV = out_BSD @ o_VD.T  # times v_j: u_i m_j
        size_BL1 = jnp.einsum("blv,vw,blw->bl", v_BLV, o_VD @ o_VD.T, v_BLV)[..., None]  # |m_j|^2
        # what the head's row leaves unexplained on average; where that is nothing, rounding must not decide
        own_BS1 = jnp.sum(out_BSD**2, -1, keepdims=True)
        values_BLX = jnp.concatenate([v_BLV, size_BL1], -1)
        mean_BSX = self.mix(q_BSH, k_BLH, values_BLX, view.sight, window=view.window)
        mean_BSV, mean_size_BS1 = mean_BSX[..., :-1], mean_BSX[..., -1:]
        left_BS1 = own_BS1 - 2 * jnp.sum(toward_BSV * mean_BSV, -1, keepdims=True) + mean_size_BS1
        left_BS1 = jnp.maximum(left_BS1, 1e-6 * (own_BS1 + mean_size_BS1) + 1e-20)
        sharp_BS1 = jax.lax.stop_gradient(1 / (self.config.sigma**2 * left_BS1))
        query_BSX = jnp.concatenate([q_BSH, toward_BSV * sharp_BS1, -sharp_BS1 / 2], -1)
        return query_BSX, jnp.concatenate([k_BLH, v_BLV, size_BL1], -1)

    def _head(self, view: AttentionView):
        """Queries, keys, values, N W_o of the chosen head."""
        N, M = view.q.shape[1], view.k.shape[1]
        head = jnp.argmin(self.row_entropy[...]) if self.config.head is None else self.config.head
        pick = lambda x, i, axis: at_least_f32(jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False))
        group = head // (N // M)
        return pick(view.q, head, 1), pick(view.k, group, 1), pick(view.v, group, 1), N * pick(view.o, head, 0)

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        if self.config.head is not None:
            return {}
        old_N, decay = self.row_entropy[...], self.config.head_decay
        return {"row_entropy": decay * old_N + (1 - decay) * stats["row_entropy"].value().astype(old_N.dtype)}

    def flops_per_token(self, hidden_size: int) -> float:
        """Logits, u W_o, |m|^2; values counted as wide as queries."""
        H = self.dims.head_dim
        return 2 * (hidden_size * (self.num_experts + H) + H * H)

    def context_flops(self, context: float) -> float:
        """For each token that is seen: a head's row and what it explains, the posterior and the distributions it mixes,
        and in training as much as another row for the entropy of all heads.
        """
        return 2 * (5 * self.dims.head_dim + self.num_experts) * context


def row_entropy(view: AttentionView) -> Stat:
    """The mean entropy of each head's rows [N], of every N-th token of a block: together as much as one head's."""
    (B, N, _, H), M = view.q.shape, view.k.shape[1]
    total_N, weight = jnp.zeros(N, jnp.float32), jnp.zeros((), jnp.float32)
    for queries, keys in view.sight.blocks():
        rows = slice(queries.start + (queries.stop - queries.start - 1) % N, queries.stop, N)  # with the last
        q = at_least_f32(view.q[:, :, rows]).reshape(B, M, -1, H)
        scores = jnp.einsum("bmsh,bmlh->bmsl", q, at_least_f32(view.k[:, :, keys])).reshape(B, N, -1, keys.stop)
        mask = view.sight.mask(rows, keys, view.window) | view.sight.itself(rows, keys)
        log_weights = jax.nn.log_softmax(jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min))
        entropy_BNS = -jnp.sum(jnp.exp(log_weights) * jnp.where(mask[:, None], log_weights, 0), -1)
        counts_BS = jnp.ones(mask.shape[:2]) if view.sight.key_valid is None else view.sight.key_valid[:, rows]
        total_N += jnp.where(counts_BS[:, None] > 0, entropy_BNS, 0).sum((0, 2))
        weight += counts_BS.sum()
    return Stat.mean(total_N, jnp.broadcast_to(weight, total_N.shape))  # layers are stacked in front of both
