"""Modality groups (MoMa, Lin et al., arXiv 2407.21770): every modality has experts of its own, which pick its tokens.

    s_te = sigmoid(x_t w_e);  group M, of E_M experts, sees the N_M valid tokens of the batch that are of modality M
    training: expert e of M takes the k = ceil(cf N_M / E_M) of them with the largest s_te;  y_t = sum s_te E_e(x_t)

No softmax; nobody took t: zero. With `gumbel_noise` training uses sigmoid(z + G' - G'') instead, for choice and gate;
the paper does once experts that begin as copies must part. What a batch picks depends on later tokens, so a predictor

    q = sigmoid(SiLU(x A_1) A_2)        binary cross-entropy to what the batch picks without noise, no gradient into x

learns beside it who will be picked. Outside training t goes to e if q_te > 1/2, weighted by s_te: NOT causal in
training, causal in evaluation and generation. The paper trains predictors on the finished model; here all along.
"""

import dataclasses
import fractions
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense
from moe_zoo.core.param import Normal, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing import by_domain
from moe_zoo.routing.router import CostBound, Dims, Router, linear_logits


@dataclasses.dataclass(frozen=True)
class ModalityGroupsConfig:
    """`num_groups` of equal size. `groups`: "domain|domain=group", names or patterns of the corpus' domains; others,
    and tokens of no known domain, are of group 0. Empty: domain id modulo `num_groups`. Ids of modalities, where a
    model has them, are the groups. `capacity_factor` cf: experts per token on average.
    """

    num_groups: int = 2
    groups: tuple[str, ...] = ()
    capacity_factor: float = 1.0
    gumbel_noise: bool = True
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_groups", "capacity_factor", "init_std")
        by_domain.check(self.groups, self.num_groups, join(path, "groups"), "num_groups")

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        if num_experts % self.num_groups:
            raise ConfigError(
                f"{join(path, 'num_groups')}: {self.num_groups} groups do not divide num_experts={num_experts}"
            )
        if self.capacity_factor > num_experts // self.num_groups:
            raise ConfigError(
                f"{join(path, 'capacity_factor')}: {self.capacity_factor} experts per token of groups of "
                f"{num_experts // self.num_groups}"
            )


class ModalityGroups(Router):
    """Groups of experts for modalities, which pick their tokens while training; at inference a predictor picks."""

    Config = ModalityGroupsConfig
    decision = Dense
    provides = ("logits",)
    requires = ("domain", "key")
    cost = CostBound(10, 6, "a predictor of D^2 / 2 weights for every token; the whole batch is sorted for each expert")

    def __init__(self, config: ModalityGroupsConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        D, E = dims.hidden_size, dims.num_experts
        hidden = max(1, D // 2)
        self.kernel = param((D, E), ("embed", "expert_logits"), Normal(config.init_std))
        self.predict_in = param((D, hidden), ("embed", None), fan_in(D))
        self.predict_out = param((hidden, E), (None, "expert_logits"), fan_in(hidden))
        if config.groups:
            self.group = by_domain.declare()

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE, member_TE = linear_logits(x_TD, self.kernel[...]), self.members(ctx)
        steer_E = ctx.inputs.get("router_bias", 0.0)
        hidden_TH = jax.nn.silu(linear_logits(jax.lax.stop_gradient(x_TD), self.predict_in[...]))
        predicted_TE = linear_logits(hidden_TH, self.predict_out[...])
        chosen_TE = predicted_TE + steer_E > 0
        if ctx.train:
            noisy_TE = logits_TE
            if self.config.gumbel_noise:  # the difference of two Gumbel variables is logistic
                noisy_TE = logits_TE + jax.random.logistic(ctx.key, logits_TE.shape, logits_TE.dtype)
            share = self.config.capacity_factor * self.config.num_groups / self.num_experts
            taken_TE = best_of_batch(noisy_TE + steer_E, member_TE, share)
            target_TE = best_of_batch(logits_TE + steer_E, member_TE, share) if self.config.gumbel_noise else taken_TE
            aux = imitation(predicted_TE, chosen_TE, target_TE, member_TE)
        else:
            noisy_TE, taken_TE, aux = logits_TE, chosen_TE & member_TE, Aux()
        gates_TE = jnp.where(taken_TE, jax.nn.sigmoid(noisy_TE), 0)
        covered = Stat.mean(taken_TE.any(-1).sum().astype(jnp.float32), member_TE.any(-1).sum().astype(jnp.float32))
        return Routing(Dense(gates_TE), logits_TE, aux=aux | Aux(stats={"coverage": covered}))

    def members(self, ctx: RoutingContext) -> Bool[Array, "T E"]:
        """Whether a token is of an expert's group; padding is of none."""
        G = self.config.num_groups
        group_T = jnp.zeros(ctx.batch * ctx.seq, jnp.int32)
        if ctx.modality is not None:
            group_T = by_domain.numbers_of(ctx.modality, None, G)
        elif ctx.domain is not None:
            group_T = by_domain.numbers_of(ctx.domain, self.group[...] if self.config.groups else None, G)
        group_E = jnp.arange(self.num_experts) // (self.num_experts // G)
        member_TE = jnp.maximum(group_T, 0)[:, None] == group_E
        return member_TE if ctx.valid is None else member_TE & ctx.valid[:, None]

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        groups = self.config.groups
        return {"group": by_domain.table(groups, domains, "model.router.groups")} if groups else {}

    def max_active(self) -> int:
        return self.num_experts // self.config.num_groups

    def active(self) -> float:
        return self.config.capacity_factor

    def flops_per_token(self, hidden_size: int) -> float:
        """Logits and predictor."""
        hidden = max(1, hidden_size // 2)
        return 2 * (hidden_size * self.num_experts + hidden_size * hidden + hidden * self.num_experts)


def best_of_batch(scores_TE: Float[Array, "T E"], member_TE: Bool[Array, "T E"], share: float) -> Bool[Array, "T E"]:
    """Each expert's ceil(share * N) best tokens of its N members, in the whole (micro-)batch, on all devices.

    N is data and shapes are static: room is kept for a batch of one modality, and what a smaller N leaves is not taken.
    """
    T, E = scores_TE.shape
    part = fractions.Fraction(share).limit_denominator(1000)  # integers: a float's ceiling may be one too many
    scores_ET = jnp.where(member_TE, jax.lax.stop_gradient(scores_TE), -jnp.inf).T
    _, tokens_EC = jax.lax.top_k(scores_ET, min(T, math.ceil(part * T)))
    most_E = -(-member_TE.sum(0, dtype=jnp.int32) * part.numerator // part.denominator)
    taken_EC = jnp.arange(tokens_EC.shape[1]) < most_E[:, None]
    return jnp.zeros((T, E), bool).at[tokens_EC, jnp.arange(E)[:, None]].set(taken_EC)


def imitation(predicted_TE: Float[Array, "T E"], chosen_TE, target_TE, member_TE) -> Aux:
    """Binary cross-entropy of the predictor's logits, the mean over tokens and experts of their group; and its F1."""
    bits_TE = jax.nn.softplus(predicted_TE) - jnp.where(target_TE, predicted_TE, 0)
    loss = jnp.where(member_TE, bits_TE, 0).sum() / jnp.maximum(member_TE.sum(), 1)
    count = lambda hit_TE: (hit_TE & member_TE).sum().astype(jnp.float32)
    agreed, all_picks = 2 * count(chosen_TE & target_TE), count(chosen_TE) + count(target_TE)
    return Aux(losses={"expert_predictor": loss}, stats={"predictor_f1": Stat.mean(agreed, all_picks)})
