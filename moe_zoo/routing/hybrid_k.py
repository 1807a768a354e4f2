"""Hybrid-k (Apollo-MoE, Zheng et al., arXiv 2410.10626): while training, the expert of a text's language takes part.

    P = softmax(x W);  I = TopK(P, K);  gates = P[I], not renormalised
    training: if the family's expert e* is not in I, it takes the place of the last, least likely of I

The gate of e* is P[e*], through which the router learns where a language belongs; there is no loss for it. At inference
the id is not looked at: a text goes where the router sends it. `families` says which expert belongs to a domain, one
for each language or one for several of a family; a token without (id -1, padding) is routed as by plain top-k.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.param import Normal, param
from moe_zoo.core.schema import join, positive
from moe_zoo.routing import by_domain
from moe_zoo.routing.router import Dims, Router, check_experts_per_tok, gather_gates, linear_logits
from moe_zoo.routing.top_k import select


@dataclasses.dataclass(frozen=True)
class HybridKConfig:
    """`families`: "domain|domain=expert", names or patterns of the corpus' domains; the others have no expert of their
    own. Empty: domain id modulo E, an expert for each language.
    """

    num_experts_per_tok: int = 2
    families: tuple[str, ...] = ()
    norm_topk_prob: bool = False
    init_std: float = 0.02

    def validate(self, path: str) -> None:
        positive(self, path, "num_experts_per_tok", "init_std")
        by_domain.parse(self.families, join(path, "families"))

    def validate_for(self, num_experts: int, path: str) -> None:
        """What can only be checked once the bank's size is known."""
        check_experts_per_tok(self.num_experts_per_tok, num_experts, path)
        by_domain.check(self.families, num_experts, join(path, "families"), "num_experts")


class HybridK(Router):
    """Top-k whose last choice, while training, makes room for the expert of the text's language family."""

    Config = HybridKConfig
    requires = ("domain",)

    def __init__(self, config: HybridKConfig, dims: Dims):
        self.config, self.num_experts = config, dims.num_experts
        self.kernel = param((dims.hidden_size, dims.num_experts), ("embed", "expert_logits"), Normal(config.init_std))
        if config.families:
            self.family = by_domain.declare()

    def __call__(self, x_TD: Float[Array, "T D"], ctx: RoutingContext) -> Routing:
        logits_TE = linear_logits(x_TD, self.kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        experts_TK = select(probs_TE, self.config.num_experts_per_tok, ctx.inputs.get("router_bias"))
        aux = Aux()
        ids_T = ctx.domain if ctx.language is None else ctx.language
        if ctx.train and ids_T is not None:
            family_X = self.family[...] if self.config.families else None
            own_T = by_domain.numbers_of(ids_T, family_X, self.num_experts)
            plain_TK, experts_TK = experts_TK, make_room(experts_TK, own_T)
            aux = Aux(stats={"replaced_fraction": changed(plain_TK, experts_TK, ctx)})
        gates_TK = gather_gates(probs_TE, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdims=True)
        return Routing(TokenChoice(experts_TK, gates_TK, self.num_experts), logits_TE, probs_TE, aux=aux)

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        families = self.config.families
        return {"family": by_domain.table(families, domains, "model.router.families")} if families else {}

    def max_active(self) -> int:
        return self.config.num_experts_per_tok


def make_room(experts_TK: Int[Array, "T K"], own_T: Int[Array, "T"]) -> Int[Array, "T K"]:
    """The choices, best first, with `own` in the last place where it is none of them; -1: nothing to make room for."""
    settled_T = (experts_TK == own_T[:, None]).any(-1) | (own_T < 0)
    # no slice of the choices: XLA on a CPU would then sort all E for them, at up to nine times the time
    last_K = jnp.arange(experts_TK.shape[1]) == experts_TK.shape[1] - 1
    return jnp.where(last_K & ~settled_T[:, None], own_T[:, None], experts_TK)


def changed(before_TK: Int[Array, "T K"], after_TK: Int[Array, "T K"], ctx: RoutingContext) -> Stat:
    """The share of valid tokens that would have been routed otherwise."""
    valid_T = jnp.ones(before_TK.shape[0], bool) if ctx.valid is None else ctx.valid
    hit_T = (before_TK != after_TK).any(-1) & valid_T
    return Stat.mean(hit_T.sum().astype(jnp.float32), valid_T.sum().astype(jnp.float32))
