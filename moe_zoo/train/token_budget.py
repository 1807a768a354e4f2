"""The budget of a model whose tokens choose their way (DynTokenRoutingViT; arXiv 2308.03409, after 2003.10401).

    L = L_task + w r (E[C] / C_full - mu)^2

E[C]: the FLOPs of all nodes, each weighted by the mean of its gates, in one micro-batch. r: 0 for `delay_steps`, then
up to 1 over `warmup_steps`: under a budget from the first step gates die before they know what for.
"""

import dataclasses

import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.train.classification import Classification, ClassificationConfig


@dataclasses.dataclass(frozen=True)
class TokenBudgetConfig(ClassificationConfig):
    """`share`: mu. `weight`: w."""

    share: float = 0.5
    weight: float = 0.8
    delay_steps: int = 0
    warmup_steps: int = 100

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "weight", "delay_steps", "warmup_steps", zero=True)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"{join(path, 'share')}: {self.share} of a model's FLOPs; expected a share in [0, 1]")


class TokenBudget(Classification):
    """Classification that pays for the FLOPs that the model's gates let through."""

    Config = TokenBudgetConfig

    def extra(self, aux, step):
        terms = [terms for terms in aux.terms().values() if "cost" in terms]
        if not terms:
            raise ConfigError("train.objective: 'token_budget' is for models with gates, such as dyn_token_routing_vit")
        share = sum(t["cost"].sum() for t in terms) / sum(t["full"].sum() for t in terms)
        config = self.config
        ramp = jnp.clip((step - config.delay_steps + 1) / max(config.warmup_steps, 1), 0, 1)
        loss = config.weight * ramp * (share - config.share) ** 2
        return loss, {"budget_loss": Stat.average(loss), "cost_share": Stat.average(share)}
