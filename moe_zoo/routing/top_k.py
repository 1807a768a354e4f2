"""Top-k in every convention that released models use.

    z = x W (+ b_z);  s = softmax(z) or sigmoid(z);  experts = TopK(s + b);  gates = s[experts] (/ sum) * scale

Conventions (model -> settings), checked against Hugging Face modelling code:
  Mixtral, Qwen3-MoE   softmax, norm_topk_prob=True (equal to a softmax over the K selected logits)
  OLMoE, Qwen2-MoE     softmax, norm_topk_prob=False
  gpt-oss, Granite     softmax_of_top_k (+ linear_bias for gpt-oss)
  DeepSeek-V2          softmax, n_group, topk_group, group_score="max", routed_scaling_factor
  LongCat-Flash        softmax, correction_bias, num_zero_experts, norm_topk_prob=False, scale 6
  DeepSeek-V3, GLM-4   sigmoid, correction_bias, n_group, topk_group, group_score="top2_sum", norm, scale 2.5
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.aux import Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Buffer, Constant, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import Dims, Router, check_experts_per_tok, gather_gates, linear_logits


@dataclasses.dataclass(frozen=True)
class TopKConfig:
    """Settings of `TopK`; names are Hugging Face's where they have one.

    `norm_topk_eps` is added to the sum that gates are divided by. `correction_bias`: a balancing bias per expert, added
    to the scores for selection only (arXiv 2408.15664); `bias_update_rate` u > 0 moves it after each step by
    u * sign(mean load - load). `num_zero_experts` Z more may be chosen that return the token as it is and cost nothing
    (LongCat-Flash, arXiv 2509.01322): `logits` have Z columns more than there are experts, `probs` do not.
    """

    num_experts_per_tok: int = 2
    score_function: Literal["softmax", "sigmoid", "softmax_of_top_k"] = "softmax"
    norm_topk_prob: bool = True
    norm_topk_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    correction_bias: bool = False
    bias_update_rate: float = 0.0
    linear_bias: bool = False
    num_zero_experts: int = 0
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "n_group", "topk_group", "init_std")
        positive(self, path, "bias_update_rate", "num_zero_experts", zero=True)
        if self.topk_group > self.n_group:
            raise ConfigError(
                f"{join(path, 'topk_group')}: {self.topk_group} groups kept of n_group={self.n_group}; "
                f"at most {self.n_group}"
            )
        if self.bias_update_rate and not self.correction_bias:
            raise ConfigError(f"{join(path, 'bias_update_rate')}: {self.bias_update_rate} needs correction_bias=true")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        K, E = self.num_experts_per_tok, num_experts
        check_experts_per_tok(K, E + self.num_zero_experts, path)
        if self.num_zero_experts and (self.n_group > 1 or self.linear_bias):
            raise ConfigError(f"{join(path, 'num_zero_experts')}: goes without groups and linear_bias")
        if E % self.n_group:
            raise ConfigError(f"{join(path, 'n_group')}: {self.n_group} groups do not divide num_experts={E}")
        if K > self.topk_group * (E // self.n_group):
            raise ConfigError(
                f"{join(path, 'num_experts_per_tok')}: {K} of the experts, but topk_group={self.topk_group} groups of "
                f"{E // self.n_group} hold only {self.topk_group * (E // self.n_group)}"
            )


class TopK(Router):
    """Each token takes its K best experts: softmax or sigmoid scores, raw or renormalised gates, groups, bias."""

    Config = TopKConfig

    def __init__(self, config: TopKConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))
        if config.linear_bias:
            self.bias = param((dims.num_experts,), ("expert_logits",), Constant(0.0))
        if config.correction_bias:
            self.correction = param((dims.num_experts,), ("expert_logits",), Constant(0.0), kind=Buffer)
        if config.num_zero_experts:
            Z = config.num_zero_experts
            self.zero_kernel = param((dims.hidden_size, Z), ("embed", None), Normal(config.init_std))
            if config.correction_bias:
                self.zero_correction = param((Z,), (None,), Constant(0.0), kind=Buffer)

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        c, E = self.config, self.num_experts
        logits_TE = linear_logits(x_TD, self.kernel[...])
        if c.linear_bias:
            logits_TE = logits_TE + self.bias[...]
        if c.num_zero_experts:
            logits_TE = jnp.concatenate([logits_TE, linear_logits(x_TD, self.zero_kernel[...])], -1)
        scores_TE = jax.nn.sigmoid(logits_TE) if c.score_function == "sigmoid" else jax.nn.softmax(logits_TE)
        bias_E = self._bias(ctx)
        plain = bias_E is None and c.n_group == 1
        experts_TK = select(
            # by logits where that is the same order: scores near 0 or 1 cannot be told apart
            logits_TE if plain else scores_TE,
            c.num_experts_per_tok,
            bias_E,
            n_group=c.n_group,
            topk_group=c.topk_group,
            group_score=c.group_score,
        )
        if c.score_function == "softmax_of_top_k":
            gates_TK = jax.nn.softmax(gather_gates(logits_TE, experts_TK))
        else:
            gates_TK = gather_gates(scores_TE, experts_TK)
            if c.norm_topk_prob:
                # 1e-20 as in DeepSeek-V3: sigmoid scores may all underflow
                gates_TK = gates_TK / (gates_TK.sum(-1, keepdims=True) + c.norm_topk_eps)
        gates_TK = gates_TK * c.routed_scaling_factor
        probs_TE = normalised(scores_TE, c.score_function)
        if not c.num_zero_experts:
            return Routing(TokenChoice(experts_TK, gates_TK, E), logits_TE, probs_TE)
        true_TK = experts_TK < E
        choice = TokenChoice(jnp.where(true_TK, experts_TK, E), jnp.where(true_TK, gates_TK, 0), E)
        return Routing(choice, logits_TE, probs_TE[:, :E], copy=jnp.where(true_TK, 0, gates_TK).sum(-1))

    def _bias(self, ctx: RoutingContext):
        """What is added to the scores for selection only."""
        c = self.config
        bias_E = self.correction[...] if c.correction_bias else None
        if "router_bias" in ctx.inputs:
            bias_E = ctx.inputs["router_bias"] + (0 if bias_E is None else bias_E)
        if bias_E is None or not c.num_zero_experts:
            return bias_E
        zeros_Z = self.zero_correction[...] if c.correction_bias else jnp.zeros(c.num_zero_experts, bias_E.dtype)
        return jnp.concatenate([bias_E, zeros_Z])

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        if not (self.config.correction_bias and self.config.bias_update_rate):
            return {}
        load_E = stats["load"].value().astype(jnp.float32)
        step_E = self.config.bias_update_rate * jnp.sign(load_E.mean() - load_E)
        return {"correction": self.correction[...] + step_E}

    def max_active(self) -> int:
        return min(self.config.num_experts_per_tok, self.num_experts)

    def active(self) -> float:
        """At balance between experts and zero experts."""
        E, Z = self.num_experts, self.config.num_zero_experts
        return self.config.num_experts_per_tok * E / (E + Z) if Z else self.max_active()

    def flops_per_token(self, hidden_size: int) -> float:
        return 2 * hidden_size * (self.num_experts + self.config.num_zero_experts)


def normalised(scores_TE: Float[Array, "T E"], score_function: str) -> Float[Array, "T E"]:
    """Scores as a distribution over experts, which balance losses expect (sigmoid scores do not sum to 1)."""
    if score_function != "sigmoid":
        return scores_TE
    return scores_TE / (scores_TE.sum(-1, keepdims=True) + 1e-20)


def select(
    scores_TE: Float[Array, "T E"],
    K: int,
    bias_E: Float[Array, "E"] | None = None,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
) -> Int[Array, "T K"]:
    """Ids of the K best experts by `scores + bias`, best first; ties go to the lower id. No gradient.

    With groups, only the `topk_group` best of `n_group` consecutive groups take part, a group scored by its best expert
    (DeepSeek-V2) or the sum of its two best (V3). Other groups are masked with -inf: the 0.0 of some releases can win
    against negative biased scores.
    """
    choice_TE = jax.lax.stop_gradient(scores_TE)
    if bias_E is not None:
        choice_TE = choice_TE + jax.lax.stop_gradient(bias_E)
    if n_group > 1:
        T, E = choice_TE.shape
        grouped_TGM = choice_TE.reshape(T, n_group, E // n_group)
        best = 1 if group_score == "max" else min(2, E // n_group)
        group_TG = jax.lax.top_k(grouped_TGM, best)[0].sum(-1)
        kept_TG = jax.lax.top_k(group_TG, topk_group)[1]
        keep_TG = (kept_TG[..., None] == jnp.arange(n_group)).any(1)
        choice_TE = jnp.where(keep_TG[..., None], grouped_TGM, -jnp.inf).reshape(T, E)
    return jax.lax.top_k(choice_TE, K)[1].astype(jnp.int32)
