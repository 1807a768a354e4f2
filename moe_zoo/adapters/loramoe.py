"""LoRAMoE (Dou et al., arXiv 2312.09979): all experts for all tokens, G = softmax(x W_g), balanced within task types.

Localized balancing: of each example b and expert e, Q_eb = sum over b's tokens of G, weighed by I_eb = 1 + delta if
the expert is of the example's type, else 1 - delta. The first half of the experts are of type 1, the others of type 0.

    L = var(I Q) / mean(I Q)^2        over all examples and experts, unbiased variance

An example is a row of the batch, as in the authors' code, where rows hold one; I is taken token by token, so a packed
row is measured by what it holds.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, valid_weights
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class LoraMoEConfig(RoutedConfig):
    """`blc_weight` of the balancing, `blc_alpha` its delta, both 0 in the authors' code unless given. `task_types`: the
    type, 0 or 1, of every domain of the data by its id; a token of no known domain has I = 1.
    """

    blc_weight: float = 0.0
    blc_alpha: float = 0.0
    task_types: tuple[int, ...] = ()

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "blc_weight", zero=True)
        if not 0 <= self.blc_alpha <= 1:
            raise ConfigError(f"{join(path, 'blc_alpha')}: expected a number in [0, 1], got {self.blc_alpha}")
        if wrong := [t for t in self.task_types if t not in (0, 1)]:
            raise ConfigError(f"{join(path, 'task_types')}: expected 0 or 1 for each domain, got {wrong[0]}")


class LoraMoE(Routed):
    """LoRAMoE: all experts, softmax gates, a balance loss that keeps two task types to their halves of the experts."""

    Config = LoraMoEConfig

    def losses(self, probs_TE, gates_TE, ctx):
        c = self.config
        if not c.blc_weight:
            return {}
        weighed_TE = gates_TE * valid_weights(gates_TE.shape[0], ctx)[:, None] * self._importance(ctx)
        return {"balance": c.blc_weight * variation(weighed_TE.reshape(ctx.batch, ctx.seq, -1).sum(1))}

    def _importance(self, ctx) -> Float[Array, "T E"]:
        E, types = self.num_experts, self.config.task_types
        if ctx.domain is None or not types:
            return jnp.ones((ctx.batch * ctx.seq, E))
        type_T = jnp.take(jnp.asarray(types), jnp.clip(ctx.domain, 0, len(types) - 1))
        own_TE = (jnp.arange(E) < E // 2) == (type_T[:, None] == 1)
        signed_TE = jnp.where(own_TE, 1 + self.config.blc_alpha, 1 - self.config.blc_alpha)
        return jnp.where((ctx.domain >= 0) & (ctx.domain < len(types)), signed_TE.T, 1).T


def variation(values: Float[Array, "B E"]) -> Float[Array, ""]:
    """Unbiased variance over the squared mean."""
    return values.var(ddof=1) / (values.mean() ** 2 + 1e-10)
