"""The loss of a model that may be left behind any layer (PonderNet, PALBERT): each layer's by its probability.

    sum_l mean_b p_l CE(logits_l, y) + beta KL

or, of a model that is left by patience (PABEE): sum_l l CE_l / sum_l l. B batch, L layers, C classes.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.exits import divergence, geometric
from moe_zoo.train.classification import Classification, inputs
from moe_zoo.train.objective import cross_entropy


@dataclasses.dataclass(frozen=True)
class PonderLossConfig:
    """`beta` times the divergence of p from the geometric prior of rate `prior`. `direction`: KL(prior || p), as in
    PALBERT's code, or KL(p || prior), as in PonderNet. `weights`: p, or by depth. `skip_passed`: layers before which
    all of the batch have passed (`tail` "released") are left out of the loss, as they are not run in PALBERT's code.
    """

    beta: float = 0.5
    prior: float = 0.1
    direction: Literal["prior_to_exit", "exit_to_prior"] = "prior_to_exit"
    weights: Literal["exit", "depth"] = "exit"
    skip_passed: bool = True

    def validate(self, path: str) -> None:
        positive(self, path, "prior")
        positive(self, path, "beta", zero=True)
        if self.prior > 1:
            raise ConfigError(f"{join(path, 'prior')}: {self.prior}; expected a probability above 0")


class PonderLoss(Classification):
    """Cross-entropy behind every layer, weighed by the probability of leaving there, and the prior of these."""

    Config = PonderLossConfig

    def loss(self, model, batch, ostate, *, step, key, fraction):
        logits_BC, aux = model(inputs(batch), train=True, step=step, key=key)
        terms, weights_B, c = aux.layers["block"][1].terms, batch["loss_weights"], self.config
        nll_LB = jax.vmap(cross_entropy, (0, None))(terms["logits"], batch["labels"])
        p_LB, L = terms["pdf"], len(nll_LB)
        if c.weights == "depth":
            share_LB = (jnp.arange(1, L + 1) / (L * (L + 1) / 2))[:, None]
        else:
            share_LB = jnp.where(terms["passed"].all(1, keepdims=True), 0, p_LB) if c.skip_passed else p_LB
        task = jnp.sum(share_LB * nll_LB * weights_B)
        kl = jnp.sum(divergence(p_LB.T, geometric(c.prior, L), c.direction) * weights_B)
        beta = c.beta if c.weights == "exit" else 0.0
        depth_B = jnp.sum(p_LB * jnp.arange(1, L + 1)[:, None], 0) / jnp.maximum(p_LB.sum(0), 1e-30)
        right_B = logits_BC.argmax(-1) == batch["labels"]
        mean = lambda value_B: Stat.mean(jnp.sum(value_B * weights_B), weights_B.sum())
        scalars = {
            "loss": Stat.sum(task), "router_loss": Stat.sum(beta * kl), "divergence": Stat.sum(kl),
            "depth": mean(depth_B), "accuracy": mean(right_B),
        }  # fmt: skip
        return task + beta * kl, {"scalars": scalars, "layers": aux.stats}
