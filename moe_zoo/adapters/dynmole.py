"""DynMoLE (Li et al., arXiv 2504.00661): all experts for tokens that the router is unsure of, few for the others.

    H_q(p) = (1 - sum_e p_e^q) / (q - 1), over its maximum: h       Tsallis entropy; q = 1: Shannon's
    kept: all, where h > entropy_threshold; else those within the top p of the mass, and the K best in any case
    G = p over the kept, not renormalised: a sparse token's update is as much smaller

The expert that crosses top_p is not kept (nucleus sampling keeps it). Losses, for each linear layer: the mean of h,
and E sum_e F_e P_e with F the mean gates, as the authors' code has it, or shares of choices (`balance="counts"`).
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, balance, mean_over_valid
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive

_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class DynMoleConfig(RoutedConfig):
    """Defaults are the authors' code's. `entropy_threshold` >= 1: no token is unsure."""

    entropy_index: float = 1.1
    entropy_threshold: float = 0.9
    top_p: float = 0.75
    keep_top_k: int = 2
    router_dyn_loss_coef: float = 0.01
    router_aux_loss_coef: float = 0.001
    balance: Literal["weights", "counts"] = "weights"

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "entropy_index")
        positive(self, path, "keep_top_k", "router_dyn_loss_coef", "router_aux_loss_coef", zero=True)
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"{join(path, 'top_p')}: expected a number in [0, 1], got {self.top_p}")
        if self.num_experts < 2:
            raise ConfigError(f"{join(path, 'num_experts')}: {self.num_experts} has no entropy; expected 2 or more")


class DynMole(Routed):
    """DynMoLE: every expert where the router's entropy is high, top-p and at least top-k where it is low."""

    Config = DynMoleConfig

    def chosen(self, probs_TE, ctx):
        c = self.config
        kept_TE = within_top_p(probs_TE, c.top_p, c.keep_top_k)
        if c.entropy_threshold < 1:
            kept_TE |= (normalised_tsallis(probs_TE, c.entropy_index) > c.entropy_threshold)[:, None]
        return jnp.where(kept_TE, probs_TE, 0)

    def losses(self, probs_TE, gates_TE, ctx):
        c = self.config
        entropy = mean_over_valid(normalised_tsallis(probs_TE, c.entropy_index), ctx)
        if c.balance == "counts":
            even = balance(probs_TE, gates_TE, self.live(), ctx)
        else:
            each = lambda values_TE: jnp.stack([mean_over_valid(v_T, ctx) for v_T in values_TE.T])
            even = self.num_experts * jnp.sum(each(gates_TE) * each(probs_TE))
        found = {"entropy": c.router_dyn_loss_coef * entropy, "balance": c.router_aux_loss_coef * even}
        return {name: value for name, value in found.items() if getattr(c, _COEFS[name])}


_COEFS = {"entropy": "router_dyn_loss_coef", "balance": "router_aux_loss_coef"}


def normalised_tsallis(probs_TE: Float[Array, "T E"], q: float) -> Float[Array, "T"]:
    """H_q over its maximum: 1 for a uniform p, 0 for a certain one; but for 1e-5 added to p as in the authors' code."""
    E, p_TE = probs_TE.shape[-1], probs_TE + _EPS
    if q == 1:
        return -(p_TE * jnp.log(p_TE)).sum(-1) / math.log(E)
    return (1 - (p_TE**q).sum(-1)) / (q - 1) / ((1 - E ** (1 - q)) / (q - 1))


def within_top_p(probs_TE: Float[Array, "T E"], top_p: float, K: int) -> Bool[Array, "T E"]:
    """The largest whose sum, themselves included, is at most top_p, and the K largest; ties to the lower id."""
    E = probs_TE.shape[-1]
    first = jnp.arange(E)[:, None] < jnp.arange(E)  # [other, own]
    other_TE1, own_T1E = probs_TE[:, :, None], probs_TE[:, None, :]
    before_TEE = (other_TE1 > own_T1E) | ((other_TE1 == own_T1E) & first)
    up_to_TE = probs_TE + (before_TEE * other_TE1).sum(1)
    return (up_to_TE <= top_p) | (before_TEE.sum(1) < K)
