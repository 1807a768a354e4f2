"""ReMoE's objective (arXiv 2412.14711, equations 6-9): next-token loss plus a penalty with a steered coefficient.

    L = L_next_token + lambda_i * mean over layers of the term `sparsity`
    lambda_{i+1} = lambda_i * factor^sign(active - target)

Active and target are shares of experts, averaged over layers and tokens of the whole step: one coefficient for all
layers. It starts tiny, so training is dense for about a hundred steps, then sparsifies, then stays: memory and time
peak at the start.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.train.objective import NextToken


@dataclasses.dataclass(frozen=True)
class AdaptiveSparsityConfig:
    """`initial` lambda_0 (paper: 1e-8) and `factor` per step (1.2)."""

    initial: float = 1e-8
    factor: float = 1.2

    def validate(self, path: str) -> None:
        positive(self, path, "initial")
        if self.factor <= 1:
            raise ConfigError(f"{join(path, 'factor')}: expected a number > 1, got {self.factor}")


class AdaptiveSparsity(NextToken):
    """Next-token loss and the routers' sparsity penalty, its coefficient steered to the target share of experts."""

    Config = AdaptiveSparsityConfig

    def init_state(self):
        return {"coefficient": jnp.float32(self.config.initial)}

    def extra(self, aux, ostate):
        terms = [term["sparsity"].mean() for term in aux.terms().values() if "sparsity" in term]
        if not terms:
            raise ConfigError(
                "train.objective: 'adaptive_sparsity' needs a router with a sparsity term, such as 'relu'"
            )
        penalty = sum(terms) / len(terms)
        scalars = {
            "sparsity_penalty": Stat.average(jax.lax.stop_gradient(penalty)),
            "sparsity_coefficient": Stat.average(ostate["coefficient"]),
        }
        return ostate["coefficient"] * penalty, scalars

    def update(self, ostate, stats):
        layers = [layer for layer in stats["layers"].values() if "active_fraction" in layer]
        mean = lambda name: sum(layer[name].value().mean() for layer in layers) / len(layers)
        direction = jnp.sign(mean("active_fraction") - mean("target_fraction"))
        return {"coefficient": ostate["coefficient"] * self.config.factor**direction}
