"""Duo-LLM's objective (arXiv 2410.10846): one budget for the big networks of all layers together.

    L = L_next_token + weight (mean over layers and tokens of p_big - share)^2

The mean is of all layers and valid tokens of a micro-batch before it is squared: one layer may take much and another
nothing, which a loss per layer would forbid. p_big is the probability of expert 0.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.train.objective import NextToken


@dataclasses.dataclass(frozen=True)
class GlobalBudgetConfig:
    """`share` r in [0, 1]; `weight` lambda (not said in the paper)."""

    share: float = 0.5
    weight: float = 1.0

    def validate(self, path: str) -> None:
        positive(self, path, "weight", zero=True)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"{join(path, 'share')}: {self.share}; expected a share in [0, 1]")


class GlobalBudget(NextToken):
    """Next-token loss, and what routers give to expert 0 on average over all layers held to a share."""

    Config = GlobalBudgetConfig

    def extra(self, aux, ostate):
        shares = [terms["budget"] for terms in aux.terms().values() if "budget" in terms]
        if not shares:
            raise ConfigError(
                "train.objective: 'global_budget' needs a router with a budget, such as 'duo_llm'; "
                "--init-from takes the router of the model, and --config.model.router.name=duo_llm another"
            )
        tokens = sum(share.weight.sum() for share in shares)
        mean = sum(share.total.sum() for share in shares) / jnp.maximum(tokens, 1)
        # of a micro-batch of padding nothing is asked
        loss = jnp.where(tokens > 0, self.config.weight * (mean - self.config.share) ** 2, 0)
        said = {"budget_loss": Stat.average(loss), "budget_share": Stat.average(mean)}
        return loss, jax.tree.map(jax.lax.stop_gradient, said)
