"""The Switch / GShard load-balance loss (arXiv 2101.03961 eq. 4-6; arXiv 2006.16668 up to a constant).

    L = E * sum_e f_e * P_e,   f_e = share of (token, slot) pairs sent to e,   P_e = mean over tokens of p_te

f is counted before any drop and carries no gradient. L is 1 at perfect balance. Per layer; layers add up.

Over which tokens f is taken decides what balance allows (Demons in the Detail, arXiv 2501.11873): within every sequence
(DeepSeek-V2's sequence-wise loss, arXiv 2405.04434) experts cannot specialise on a domain, over the whole step they
can. Losses of groups are averaged, weighted by their valid tokens; with equal groups g

    mean_g L_g - L = E * sum_e Cov_g(f_ge, P_ge)
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class LoadBalanceConfig:
    """`coef` multiplies the loss of each layer (Switch, OLMoE: 0.01).

    `over` which tokens f and P are taken, on any mesh the same:
      "micro"     `sequences` consecutive rows of a micro-batch (None: all of it, whatever devices it is spread over)
      "sequence"  each row by itself
      "global"    the optimizer step; with `train.accumulation` > 1 a pass forward counts it first (a third more work)
      "buffer"    f of this micro-batch and those of the step before it, P of this one: the paper's, at no cost
    Without accumulation "global", "buffer" and "micro" with all sequences are the same.

    `choices` that f counts: "all", or the "first" of each token only (GShard).
    """

    coef: float = 0.01
    over: Literal["micro", "sequence", "global", "buffer"] = "micro"
    sequences: int | None = None
    choices: Literal["all", "first"] = "all"

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)
        positive(self, path, "sequences")
        if self.sequences is not None and self.over != "micro":
            raise ConfigError(
                f"{join(path, 'sequences')}: {self.sequences} is the size of a micro-batch; it needs over='micro', "
                f"got over={self.over!r}"
            )
        if self.choices == "first" and self.over in ("global", "buffer"):
            raise ConfigError(
                f"{join(path, 'over')}: {self.over!r} uses the load of other micro-batches, which counts all choices; "
                "choices='first' needs over='micro' or 'sequence'"
            )


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """Pulls the share of tokens per expert and the mean router probability together towards uniform."""

    Config: ClassVar = LoadBalanceConfig
    #: Decision types it can be applied to
    decisions: ClassVar = (TokenChoice,)
    #: the field of Routing that it is computed from
    uses: ClassVar = "probs"

    config: LoadBalanceConfig

    @property
    def of_step(self) -> str | None:
        """What it must know of the step's other micro-batches: "step" (all), "before", or None."""
        return {"global": "step", "buffer": "before"}.get(self.config.over)

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        choice = routing.decision
        experts_TK = choice.experts if self.config.choices == "all" else choice.experts[:, :1]
        own = lambda experts_TK: TokenChoice(experts_TK, experts_TK, choice.num_experts).counts()
        rows = {"sequence": 1, "micro": self.config.sequences or ctx.batch}.get(self.config.over)
        if rows is not None and rows < ctx.batch:
            size = rows * ctx.seq
            experts_GTK, probs_GTE, valid_GT = grouped(size, experts_TK, routing.probs, ctx.valid, choice.num_experts)
            return mean_load_balance(probs_GTE, jax.vmap(own)(experts_GTK), valid_GT)
        counts_E, tokens, E = own(experts_TK), None, choice.num_experts
        known = ctx.inputs.get(self.of_step)
        if known is not None and self.of_step == "step":
            counts_E, tokens = known["load"][:E], known["tokens"]
        elif known is not None:
            counts_E = counts_E + known["load"][:E]
        return load_balance(routing.probs, counts_E, ctx.valid, tokens)


def load_balance(
    probs_TE: Float[Array, "T E"],
    counts_E: Float[Array, "E"],
    valid_T: Bool[Array, "T"] | None = None,
    tokens: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """E * sum_e f_e P_e over the valid tokens; 0 if there is none.

    `counts_E` may be those of more tokens than these. `tokens`: what the sum of probabilities is divided by, if not
    these valid tokens: their mean over the micro-batches of a step makes the mean of the losses that of the step.
    """
    E = probs_TE.shape[-1]
    counts_E = jax.lax.stop_gradient(counts_E).astype(probs_TE.dtype)
    f_E = counts_E / jnp.maximum(counts_E.sum(), 1)
    if valid_T is None and tokens is None:
        return E * jnp.sum(f_E * probs_TE.mean(0))
    valid_T = jnp.ones(probs_TE.shape[0], bool) if valid_T is None else valid_T
    tokens = jnp.maximum(valid_T.sum(), 1) if tokens is None else jnp.where(tokens > 0, tokens, 1)
    P_E = jnp.where(valid_T[:, None], probs_TE, 0).sum(0) / tokens.astype(probs_TE.dtype)
    return E * jnp.sum(f_E * P_E)


def mean_load_balance(
    probs_GTE: Float[Array, "G T E"], counts_GE: Float[Array, "G E"], valid_GT: Bool[Array, "G T"] | None = None
) -> Float[Array, ""]:
    """The loss of each of G groups by itself, averaged with their numbers of valid tokens as weights."""
    if valid_GT is None:
        return jax.vmap(load_balance)(probs_GTE, counts_GE).mean()
    tokens_G = valid_GT.sum(1)
    return jnp.sum(jax.vmap(load_balance)(probs_GTE, counts_GE, valid_GT) * tokens_G) / jnp.maximum(tokens_G.sum(), 1)


def grouped(size: int, experts_TK, probs_TE, valid_T, E: int):
    """(experts, probabilities, validity) in groups of `size` tokens; the last is filled up with what is not valid."""
    T = probs_TE.shape[0]
    fill = -T % size
    if fill:
        valid_T = jnp.pad(jnp.ones(T, bool) if valid_T is None else valid_T, (0, fill))
        experts_TK = jnp.pad(experts_TK, ((0, fill), (0, 0)), constant_values=E)
        probs_TE = jnp.pad(probs_TE, ((0, fill), (0, 0)))
    cut = lambda x: None if x is None else x.reshape(-1, size, *x.shape[1:])
    return cut(experts_TK), cut(probs_TE), cut(valid_T)
