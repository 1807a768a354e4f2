"""The Routing Transformer (Roy et al., arXiv 2003.05997): heads that look around them, and heads whose tokens meet in
clusters, wherever they are.

    r = norm(q), keys being the queries (share_qk);   a_tc = r_t . mu_c
    I_c = the W tokens with the highest a_tc;   o = softmax(q k / temperature) v among I_c, to earlier ones
    out_t = the sum of o over the clusters that t is in / (their number + count_eps)

The means mu follow the tokens by k-means, the mean of those nearest to them, averaged over steps; no gradient reaches
them. Whether t is in I_c depends on later tokens. What does not:

    "centroid_topk" at inference    I_c are the W best of the tokens up to t, when it is t's turn
    "token_argmax"                  t is in its nearest cluster alone, with the W - 1 of it before t; in training too

B batch, S sequence, D model, N heads, K clusters, W members of a cluster, H head size.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.param import Buffer, Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.attention import AttentionConfig, RotaryKey
from moe_zoo.layers.rope import rotate
from moe_zoo.mixers import clusters
from moe_zoo.mixers.clusters import NOBODY, Heads
from moe_zoo.mixers.mixer import LearningMixer, Span

#: settings of attention that it has a place for
_ATTENTION = (
    "num_attention_heads", "head_dim", "rope_theta", "rotary_dim", "rope_interleaved", "rope_scaling", "norm_eps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RoutedAttentionConfig:
    """`local_heads`: how many of `attention.num_attention_heads` look at the last `local_window` tokens; None: half.
    The others route: `num_clusters` K, each of `window` W tokens.

    `vectors`: what routing heads compare: "normed" queries and keys, layer norm without weights (the released code);
    "unit", of length 1, by which tokens are routed, and keys also compared if they are shared (lucidrains); "plain".
    `temperature`: of a routing head's scores; None: sqrt(H). With "normed" the released code has 1, where a shared
    query finds itself with a score of H. `sees_itself` False: only if there is nobody else.
    `decay`, `eps`: of the means' moving averages, and what is added to their counts. `commitment`: times the mean
    square of r - mu. `clusters` "random": tokens are scored at random by their position, what is left without k-means.
    """

    local_heads: int | None = None
    local_window: int = 256
    num_clusters: int = 16
    window: int = 32
    assignment: Literal["centroid_topk", "token_argmax"] = "centroid_topk"
    clusters: Literal["learned", "random"] = "learned"
    share_qk: bool = True
    vectors: Literal["normed", "unit", "plain"] = "normed"
    temperature: float | None = None
    sees_itself: bool = True
    count_eps: float = 0.0
    decay: float = 0.999
    eps: float = 1e-5
    commitment: float = 1e-4

    def validate(self, path: str) -> None:
        positive(self, path, "local_window", "num_clusters", "window", "temperature")
        positive(self, path, "local_heads", "count_eps", "decay", "eps", "commitment", zero=True)
        if self.decay >= 1:
            raise ConfigError(f"{join(path, 'decay')}: {self.decay}; expected less than 1")
        if self.assignment == "token_argmax" and not self.share_qk:
            raise ConfigError(
                f"{join(path, 'share_qk')}: False, where a query has another cluster than its own key, which "
                "assignment 'token_argmax' has no place for; expected True, or 'centroid_topk'"
            )


@dataclasses.dataclass(frozen=True)
class Spread:
    """Normal numbers, each vector normed as tokens are."""

    vectors: str

    def __call__(self, rng, shape):
        x = rng.standard_normal(shape)
        if self.vectors == "normed":
            x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return (x / (x * x).sum(-1, keepdims=True) ** 0.5 if self.vectors == "unit" else x).astype("float32")


class RoutedAttention(LearningMixer):
    """Routing Transformer: attention to the last tokens, and within clusters of tokens that k-means finds."""

    Config = RoutedAttentionConfig

    @classmethod
    def build(cls, config, attention: AttentionConfig, *, hidden_size: int, out_scale: float, num_layers: int):
        usual = AttentionConfig()
        for field in dataclasses.fields(attention):
            if field.name not in _ATTENTION and getattr(attention, field.name) != getattr(usual, field.name):
                raise ConfigError(
                    f"model.attention.{field.name}: mixer 'routed_attention' has no place for it; what it reads: "
                    f"{', '.join(_ATTENTION)}"
                )
        return cls(config, attention, hidden_size=hidden_size, out_scale=out_scale)

    def __init__(
        self, config: RoutedAttentionConfig, attention: AttentionConfig, *, hidden_size: int, out_scale: float
    ):
        D, N, H = hidden_size, attention.num_attention_heads, attention.query_size(hidden_size)
        if not H or H % 2:
            raise ConfigError(f"model.attention.num_attention_heads: {N} of hidden size {D} gives no even head size")
        local = N // 2 if config.local_heads is None else config.local_heads
        if local >= N:
            raise ConfigError(
                f"model.mixer.local_heads: {local} of attention.num_attention_heads={N} leaves none to route; at most "
                f"{N - 1}"
            )
        self.config, self.attention, self.dims = config, attention, (D, N, local, H)
        axes = ("embed", "heads", "head_dim")
        self.q = param((D, N, H), axes, fan_in(D))
        if self.own_keys:
            self.k = param((D, self.own_keys, H), axes, fan_in(D))
        self.v = param((D, N, H), axes, fan_in(D))
        self.o = param((N, H, D), ("heads", "head_dim", "embed"), fan_in(N * H, out_scale))
        if config.clusters == "learned":
            K = config.num_clusters
            self.means = param((N - local, K, H), ("heads", None, "head_dim"), Spread(config.vectors), kind=Buffer)
            self.counts = param((N - local, K), ("heads", None), Constant(1.0), kind=Buffer)

    @property
    def own_keys(self) -> int:
        """Heads whose keys are not their queries."""
        _, N, local, _ = self.dims
        return local if self.config.share_qk else N

    @property
    def rotary_key(self) -> RotaryKey | None:
        """Which angles it turns by; None for none."""
        c = self.attention
        return None if c.rotary_dim == 0 else (c.rotary_dim or self.dims[3], c.rope_theta, c.rope_scaling)

    @property
    def competes(self) -> bool:
        return self.config.assignment == "centroid_topk"

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last tokens of the local heads, and the members of all clusters."""
        c, (_, N, local, H) = self.config, self.dims
        past = min(c.local_window - 1, max_seq)
        return {
            "k": jnp.zeros((batch, local, past, H), dtype),
            "v": jnp.zeros((batch, local, past, H), dtype),
            "there": jnp.zeros((batch, past), bool),
            "members": clusters.empty(batch, N - local, c.num_clusters, min(c.window, max_seq), H, dtype),
        }

    def mix(self, x_BSD, span: Span, state: dict):
        """As `LearningMixer`."""
        B, S, D = x_BSD.shape
        local = self.dims[2]
        raw = self._project(x_BSD)
        turned = self._turned(raw, span)
        live_BS = jnp.ones((B, S), bool) if span.valid is None else span.valid
        group_BS = jnp.zeros((B, S), jnp.int32) if span.documents is None else span.documents
        near, state = self._local(turned.heads(slice(local)), span, group_BS, state)
        far, members, aux = self._routed(raw, turned, span, live_BS, group_BS, state["members"])
        out_BNSH = jnp.concatenate([near, far], axis=1) if local else far
        flat = out_BNSH.transpose(0, 2, 1, 3).reshape(B, S, -1)
        return flat @ self.o[...].astype(flat.dtype).reshape(-1, D), state | {"members": members}, aux

    # ------------------------------------------------------------------------------------------------------ projections

    def _project(self, x_BSD) -> Heads:
        """Of all heads, the local ones first; before normed and turned."""
        B, S, D = x_BSD.shape
        H = self.dims[3]
        names = ["q", "v"] + (["k"] if self.own_keys else [])
        weights = [getattr(self, name)[...].reshape(D, -1).astype(x_BSD.dtype) for name in names]
        parts = x_BSD.reshape(B * S, D) @ jnp.concatenate(weights, axis=1)
        parts = parts.reshape(B, S, -1, H).transpose(0, 2, 1, 3)
        q, v, k = jnp.split(parts, [self.dims[1], 2 * self.dims[1]], axis=1)
        return Heads(q, jnp.concatenate([k, q[:, self.own_keys :]], axis=1), v)

    def _turned(self, raw: Heads, span: Span) -> Heads:
        """Queries and keys as they are compared: those of routing heads normed, all turned by their positions."""
        local, norm = self.dims[2], self.config.vectors
        q, k = raw.q, raw.k
        if norm == "normed":
            q, k = (jnp.concatenate([x[:, :local], self._vectors(x[:, local:])], axis=1) for x in (q, k))
        elif norm == "unit" and self.config.share_qk:
            k = jnp.concatenate([k[:, :local], self._vectors(k[:, local:])], axis=1)
        if span.angles is not None:
            q, k = (rotate(x, span.angles, self.attention.rope_interleaved) for x in (q, k))
        return Heads(q, k, raw.v)

    def _vectors(self, x_BNSH):
        """What is compared with the means."""
        wide = x_BNSH.astype(jnp.promote_types(x_BNSH.dtype, jnp.float32))
        if self.config.vectors == "normed":
            wide = clusters.normal_layer(wide, self.attention.norm_eps)
        elif self.config.vectors == "unit":
            wide = clusters.unit(wide)
        return wide.astype(x_BNSH.dtype)

    # ------------------------------------------------------------------------------------------------------------ heads

    def _local(self, new: Heads, span: Span, group_BS, state: dict):
        """(output of the local heads, state with their last tokens)."""
        B, local, S, H = new.q.shape
        if not local:
            return None, state
        past = state["there"].shape[1]
        k, v = (jnp.concatenate([state[n].astype(new.q.dtype), getattr(new, n)], axis=2) for n in "kv")
        group = jnp.concatenate([jnp.where(state["there"], 0, NOBODY), group_BS], axis=1)
        q = jnp.pad(new.q, ((0, 0), (0, 0), (past, 0), (0, 0)))
        heads = jnp.broadcast_to(group[:, None], (B, local, past + S))
        out = clusters.banded(Heads(q, k, v), heads, self.config.local_window, H**-0.5, past=past)
        count = jnp.full((B,), S) if span.count is None else span.count
        rows = count[:, None] + jnp.arange(past)
        last = jnp.take_along_axis(group, rows, axis=1)
        k, v = (jnp.take_along_axis(x, rows[:, None, :, None], axis=2) for x in (k, v))
        return out, state | {"k": k, "v": v, "there": (last == last[:, -1:]) & (last != NOBODY)}

    def _routed(self, raw: Heads, turned: Heads, span: Span, live_BS, group_BS, members):
        """(output of the routing heads, members of their clusters, Aux)."""
        c, (_, _, local, H) = self.config, self.dims
        x, sizes = turned.heads(slice(local, None)), dict(scale=1 / (c.temperature or H**0.5), itself=c.sees_itself)
        r = self._vectors(raw.q[:, local:])
        streams = [r] if c.share_qk else [r, self._vectors(raw.k[:, local:])]
        scores = [jax.lax.stop_gradient(self._scores(stream, span)) for stream in streams]
        aux = self._learn(streams, scores, live_BS) if span.train and c.clusters == "learned" else Aux()
        cached = members["at"].shape[-1] > 0
        if c.assignment == "token_argmax" and not cached:
            group_BNS = jnp.broadcast_to(group_BS[:, None], scores[0].shape[:3])
            out = clusters.within_own(x, scores[0].argmax(-1), group_BNS, c.window, **sizes)
            return out / (1 + c.count_eps), members, aux
        if (span.train or self.as_trained) and not cached:
            chosen = [clusters.best(a_BNSK, live_BS, c.window) for a_BNSK in scores]
            total, count = clusters.within_chosen(x, chosen[0], chosen[-1], live_BS, group_BS, **sizes)
        else:
            total, count, members = self._in_turn(x, scores, members, live_BS, group_BS, span, sizes)
        count = jnp.where(count > 0, count + c.count_eps, 1).astype(jnp.float32)
        return (total / count[..., None]).astype(total.dtype), members, aux

    def _in_turn(self, x: Heads, scores, members, live_BS, group_BS, span: Span, sizes):
        """Token by token, each among those before it."""
        B, N, S, H = x.q.shape
        if self.config.assignment == "token_argmax":  # the last of the own cluster: by when they came
            mine = scores[0].argmax(-1)[..., None] == jnp.arange(self.config.num_clusters)
            scores = [jnp.where(mine, span.positions[:, None, :, None].astype(jnp.float32), -jnp.inf)]
        if not members["at"].shape[-1]:
            members = clusters.empty(B, N, self.config.num_clusters, min(self.config.window, S), H, x.v.dtype)
        return clusters.one_by_one(x, scores[0], scores[-1], members, live_BS, group_BS, span.positions, **sizes)

    # ------------------------------------------------------------------------------------------------------- the means

    def _scores(self, r_BNSH, span: Span) -> Float[Array, "B N S K"]:
        if self.config.clusters == "learned":
            return jnp.einsum("bnsh,nkh->bnsk", r_BNSH.astype(jnp.float32), self.means[...])
        N, K = r_BNSH.shape[1], self.config.num_clusters
        key = jax.random.fold_in(jax.random.key(0), 0 if span.layer is None else span.layer)
        draw = lambda place: jax.random.uniform(jax.random.fold_in(key, place), (N, K))
        return jnp.swapaxes(jax.vmap(jax.vmap(draw))(span.positions), 1, 2)

    def _learn(self, streams, scores, live_BS) -> Aux:
        """The commitment loss, and what the means are made of."""
        K, means_NKH = self.config.num_clusters, jax.lax.stop_gradient(self.means[...])
        count, total, square, size = 0, 0, 0, live_BS.sum() * streams[0].shape[1] * len(streams)
        for r, a_BNSK in zip(streams, scores, strict=True):
            r, nearest_BNS = r.astype(jnp.float32), a_BNSK.argmax(-1)
            own = means_NKH[jnp.arange(means_NKH.shape[0])[:, None], nearest_BNS]
            square += jnp.where(live_BS[:, None], jnp.mean((r - own) ** 2, -1), 0).sum()
            new, sums = clusters.assigned(jax.lax.stop_gradient(r), nearest_BNS, live_BS, K)
            count, total = count + new, total + sums
        loss = square / jnp.maximum(size, 1)
        stats = {
            "clusters/count": Stat.sum(count), "clusters/sum": Stat.sum(total),
            "cluster_distance": Stat.average(jax.lax.stop_gradient(loss)),
            "cluster_largest": Stat.average((count / jnp.maximum(count.sum(-1, keepdims=True), 1)).max(-1).mean()),
        }  # fmt: skip
        return Aux(losses={"commitment": self.config.commitment * loss}, stats=stats)

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New means from the sums over all micro-batches and devices."""
        if self.config.clusters != "learned":
            return {}
        c, new, sums = self.config, stats["clusters/count"].value(), stats["clusters/sum"].value()
        if c.vectors == "unit":
            return {"means": clusters.averaged_directions(self.means[...], new, sums, c.decay)}
        means, counts = clusters.averaged(self.means[...], self.counts[...], new, sums, c.decay, c.eps)
        return {"means": means, "counts": counts}

    def flops_per_token(self, context: float) -> float:
        """Projections, the local heads' visible keys, distances to the means, and in the clusters the keys that a
        member sees on average, times the clusters that a token of a text of 2 `context` - 1 is in.
        """
        c, (D, N, local, H) = self.config, self.dims
        flops = 2 * D * H * (3 * N + self.own_keys) + 4 * local * H * min(context, c.local_window)
        if c.clusters == "learned":
            flops += 2 * (N - local) * c.num_clusters * H * (1 if c.share_qk else 2)
        if c.assignment == "token_argmax":
            return flops + 4 * (N - local) * H * min(context, c.window)
        S = 2 * context - 1
        W = min(c.window, S)
        return flops + 4 * (N - local) * H * c.num_clusters * W / S * (W + 1) / 2
