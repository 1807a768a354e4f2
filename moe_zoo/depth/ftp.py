"""FTP (arXiv 2412.11494), our reading: four numbers of a token say whether it goes through a block of a frozen model.

    u_t = (place_t, a_t, rank of a_t, s_l)      a_t: attention got in the block below, s_l: the part that is to pass by
    p_t = softmax(MLP(u_t))_1;   M_t = 1[p_t >= 1/2] + (p_t - stop_gradient(p_t));   x_t + M_t (block(x)_t - x_t)

    guide      -log p of what the static router says, which keeps the tokens with the largest a_t
    sparsity   (mean_t M_t - (1 - s_l))^2
    distillation of the whole model is the objective's (`train/distill.py`)

Tokens of a prompt are compared with each other, later ones with those so far, and a_t is of the same queries
(`attention.py`): so a prompt may look at itself, and what is generated at nothing that is still to come. The first and
the last tokens of a prompt always go through.

B batch, S sequence, D model, L places of the cache.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.depth.attention import DEPTH
from moe_zoo.depth.selector import Retrofit, Selection, drawn
from moe_zoo.depth.sequence import Documents
from moe_zoo.routing.router import Shared, at_least_f32

FEATURES = 4


@dataclasses.dataclass(frozen=True)
class FtpConfig:
    """`sparsities`: of each layer of the model, the part of its tokens that pass by; one number is of all. `router`:
    "dynamic" as above; "hidden" a linear map of the hidden state, trained alike, to see what four numbers are worth;
    "static" learns nothing, and "random" is that with scores that are drawn. `share_router`: one "dynamic" router for
    all layers, which are told apart by their sparsities. `kv_for_skipped`: those that pass by leave
    keys and values for later ones to see, which costs their projections. `keep_first`, `keep_last`: tokens of a prompt
    that always go through, unless none may. `guide_coef` falls to zero over `guide_steps`; None: it stays.
    """

    sparsities: tuple[float, ...] = (0.25,)
    router: Literal["dynamic", "hidden", "static", "random"] = "dynamic"
    router_hidden: int = 32
    kv_for_skipped: bool = True
    keep_first: int = 1
    keep_last: int = 1
    guide_coef: float = 1.0
    guide_steps: int | None = None
    sparsity_coef: float = 1.0
    share_router: bool = dataclasses.field(default=False, metadata={"silent": True})

    def validate(self, path: str) -> None:
        positive(self, path, "router_hidden", "guide_steps")
        positive(self, path, "keep_first", "keep_last", "guide_coef", "sparsity_coef", zero=True)
        if not self.sparsities or not all(0 <= s <= 1 for s in self.sparsities):
            raise ConfigError(
                f"{join(path, 'sparsities')}: expected numbers in [0, 1], one or one per layer; got "
                f"{list(self.sparsities)}"
            )
        if self.share_router and self.router != "dynamic":
            raise ConfigError(f"{join(path, 'share_router')}: expected router 'dynamic', got {self.router!r}")


def _declare_mlp(at: nnx.Module, hidden: int) -> None:
    """The variables of a dynamic router, of one layer or of all, as those of `at`."""
    at.hidden_in = param((FEATURES, hidden), (None, None), fan_in(1))
    at.hidden_bias = param((hidden,), (None,), Constant(0.0))
    at.out = param((hidden, 2), (None, None), fan_in(hidden))
    at.out_bias = param((2,), (None,), Constant(0.0))


class OneRouter(Shared):
    """The dynamic router of all layers."""

    def __init__(self, hidden: int):
        _declare_mlp(self, hidden)


class Ftp(Retrofit):
    """FTP: by place, attention got and its rank, each token goes through a block of a finished model or passes by."""

    Config = FtpConfig
    reads_attention = True

    def __init__(self, config: FtpConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        if config.router == "dynamic" and not config.share_router:
            _declare_mlp(self, config.router_hidden)
        if config.router == "hidden":
            self.kernel = param((hidden_size,), ("embed",), fan_in(hidden_size))
            self.bias = param((), (), Constant(0.0))

    @classmethod
    def make_shared(cls, config: FtpConfig, hidden_size: int) -> OneRouter | None:
        return OneRouter(config.router_hidden) if config.share_router else None

    @property
    def leaves_keys(self) -> bool:
        return self.config.kv_for_skipped

    def __call__(self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext) -> Selection:
        scores_BS, among = ctx.carry[DEPTH].reshape(ctx.batch, ctx.seq), Compared.of(ctx)
        if self.config.router == "random":
            scores_BS = drawn(ctx)
        s = self.sparsity(ctx)
        forced_BS = among.ends(self.config.keep_first, self.config.keep_last)
        kept_BS, cache = among.kept(scores_BS, forced_BS, s), among.cache(scores_BS, forced_BS)
        if "depth" in ctx.inputs:
            kept_BS = jnp.broadcast_to(ctx.inputs["depth"][:, None] > 0, kept_BS.shape)
        if "depth" in ctx.inputs or self.config.router in ("static", "random"):
            return self._said(kept_BS, kept_BS.astype(jnp.float32), cache=cache)
        if self.config.router == "hidden":
            logits_BS = at_least_f32(x_BSD) @ at_least_f32(self.kernel[...]) + at_least_f32(self.bias[...])
        else:
            features = [among.place(), scores_BS, among.rank(scores_BS), jnp.full_like(scores_BS, s)]
            mlp = ctx.shared[DEPTH] if self.config.share_router else self
            logits_BS = go_or_stay(mlp, jnp.stack(features, axis=-1))
        go_BS = ((logits_BS >= 0) | forced_BS | (s == 0)) & (s < 1)
        if not (ctx.train and self.trains):
            return self._said(go_BS, go_BS.astype(jnp.float32), cache=cache)
        probs_BS = jax.nn.sigmoid(logits_BS)
        mask_BS = go_BS + (probs_BS - jax.lax.stop_gradient(probs_BS))
        return self._said(go_BS, mask_BS, aux=self._losses(logits_BS, mask_BS, kept_BS, s, ctx))

    def _said(self, chosen_BS: Bool[Array, "B S"], weights_BS: Float[Array, "B S"], **more) -> Selection:
        seen_BS = jnp.ones_like(chosen_BS) if self.config.kv_for_skipped else chosen_BS
        return Selection(None, chosen_BS, weights_BS, seen=seen_BS, **more)

    def sparsity(self, ctx: RoutingContext) -> Float[Array, ""]:
        """Of this layer; `inputs["depth_sparsity"]` [L] says another."""
        if "depth_sparsity" in ctx.inputs:
            return ctx.inputs["depth_sparsity"]
        each = jnp.asarray(self.config.sparsities, jnp.float32)
        return each[jnp.minimum(ctx.layer, len(each) - 1)]

    def _losses(self, logits_BS, mask_BS, kept_BS, s, ctx: RoutingContext) -> Aux:
        valid_BS = jnp.ones(kept_BS.shape, bool) if ctx.valid is None else ctx.valid.reshape(kept_BS.shape)
        mean = lambda a_BS: jnp.where(valid_BS, a_BS, 0).sum() / jnp.maximum(valid_BS.sum(), 1)
        guide = mean(jax.nn.softplus(logits_BS) - jnp.where(kept_BS, logits_BS, 0))
        budget = jnp.square(mean(mask_BS) - (1 - s))
        c, fade = self.config, 1.0
        if c.guide_steps is not None:
            fade = jnp.maximum(0.0, 1 - (0 if ctx.step is None else ctx.step) / c.guide_steps)
        agree = jnp.where(valid_BS, (logits_BS >= 0) == kept_BS, False).sum().astype(jnp.float32)
        return Aux(
            losses={"depth_guide": c.guide_coef * fade * guide, "depth_sparsity": c.sparsity_coef * budget},
            stats={"depth_guided": Stat.mean(agree, valid_BS.sum().astype(jnp.float32))},
        )

    def init_cache(self, batch: int, max_seq: int):
        """Of the tokens so far: scores, which of them had to go through, and which there are."""
        none = jnp.zeros((batch, max_seq), bool)
        return {"scores": jnp.zeros((batch, max_seq), jnp.float32), "forced": none, "there": none}

    @property
    def share(self) -> float:
        return 1 - sum(self.config.sparsities) / len(self.config.sparsities)

    def flops_per_token(self) -> float:
        of_router = {"dynamic": 2 * self.config.router_hidden * (FEATURES + 2), "hidden": 2 * self.hidden_size}
        return of_router.get(self.config.router, 0)


def go_or_stay(mlp: Ftp | OneRouter, features_BSU: Float[Array, "B S U"]) -> Float[Array, "B S"]:
    """How much more likely a token goes through than not: log p_1 / p_0."""
    hidden_in, bias, out, out_bias = (
        at_least_f32(p[...]) for p in (mlp.hidden_in, mlp.hidden_bias, mlp.out, mlp.out_bias)
    )
    both = jax.nn.relu(features_BSU @ hidden_in + bias) @ out + out_bias
    return both[..., 1] - both[..., 0]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Which of the L tokens so far (without a cache those of this call) each token of this call is compared with: of a
    prompt with all of it, behind it with those up to itself. `at`: the place of this call's first token among the L.
    """

    with_BSL: Bool[Array, "B S L"]
    prompt_BS: Bool[Array, "B S"]
    at: Int[Array, ""] | int
    memory: dict | None

    @classmethod
    def of(cls, ctx: RoutingContext) -> "Compared":
        documents = Documents.of(ctx)
        B, S = documents.prompt.shape
        valid_BS = jnp.ones((B, S), bool) if ctx.valid is None else ctx.valid.reshape(B, S)
        at = 0 if ctx.cache is None else ctx.at
        there_BL = valid_BS if ctx.cache is None else _put(ctx.cache["there"], valid_BS, at)
        L = there_BL.shape[1]
        own_S, all_L = at + jnp.arange(S), jnp.arange(L)
        prompt_BL = documents.prompt if ctx.cache is None else _put(jnp.zeros((B, L), bool), documents.prompt, at)
        pairs = (all_L <= own_S[:, None]) | documents.prompt[:, :, None] & prompt_BL[:, None, :]
        if not documents.single:
            pairs &= documents.start[:, :, None] == documents.start[:, None, :]
        memory = None if ctx.cache is None else ctx.cache | {"there": there_BL}
        return cls(pairs & there_BL[:, None, :], documents.prompt, at, memory)

    def cache(self, scores_BS: Float[Array, "B S"], forced_BS: Bool[Array, "B S"]) -> dict | None:
        """What is remembered of the tokens so far, these among them."""
        if self.memory is None:
            return None
        return self.memory | {"scores": self._all("scores", scores_BS), "forced": self._all("forced", forced_BS)}

    def _all(self, name: str, new_BS):
        return new_BS if self.memory is None else _put(self.memory[name], new_BS, self.at)

    @property
    def count_BS(self) -> Int[Array, "B S"]:
        return jnp.maximum(self.with_BSL.sum(2), 1)

    @property
    def earlier_SL(self) -> Bool[Array, "S L"]:
        """Whether one comes before the other in the text."""
        _, S, L = self.with_BSL.shape
        return jnp.arange(L) < (self.at + jnp.arange(S))[:, None]

    @property
    def before_BS(self) -> Int[Array, "B S"]:
        return (self.with_BSL & self.earlier_SL).sum(2)

    def place(self) -> Float[Array, "B S"]:
        """The part of them that comes earlier in the text."""
        return self.before_BS / self.count_BS

    def rank(self, scores_BS: Float[Array, "B S"]) -> Float[Array, "B S"]:
        """The part of them that has got more attention, in [0, 1)."""
        return self._above(scores_BS, self._all("scores", scores_BS)) / self.count_BS

    def _above(self, scores_BS, scores_BL) -> Int[Array, "B S"]:
        """How many of them come before each token in the order of scores, ties in the order of the text."""
        mine, theirs = scores_BS[:, :, None], scores_BL[:, None, :]
        return (self.with_BSL & ((theirs > mine) | (theirs == mine) & self.earlier_SL)).sum(2)

    def ends(self, first: int, last: int) -> Bool[Array, "B S"]:
        """The first and the last tokens of a prompt."""
        return self.prompt_BS & ((self.before_BS < first) | (self.before_BS >= self.count_BS - last))

    def kept(
        self, scores_BS: Float[Array, "B S"], forced_BS: Bool[Array, "B S"], s: Float[Array, ""]
    ) -> Bool[Array, "B S"]:
        """What the static router keeps: of n tokens n - round(s n), forced ones first and then the highest scores."""
        above_all = lambda scores, forced: jnp.where(forced, jnp.inf, scores)
        all_BL = above_all(self._all("scores", scores_BS), self._all("forced", forced_BS))
        before_BS = self._above(above_all(scores_BS, forced_BS), all_BL)
        return before_BS < self.count_BS - jnp.round(s * self.count_BS)


def _put(old_BL, new_BS, at):
    return jax.lax.dynamic_update_slice_in_dim(old_BL, new_BS.astype(old_BL.dtype), at, 1)
