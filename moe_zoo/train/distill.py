"""Selectors of depth learn from the whole model: what it says of the next token with all tokens in all layers.

KL(softmax z_whole || softmax z) + c CE + the selectors' own losses        z_whole without gradient
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.schema import positive
from moe_zoo.train.objective import NextToken, cross_entropy, forward


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """`next_token_coef`: c."""

    next_token_coef: float = 0.0

    def validate(self, path: str) -> None:
        positive(self, path, "next_token_coef", zero=True)


class Distill(NextToken):
    """The teacher is the same frozen model, its selectors told that everybody goes through once."""

    Config = DistillConfig
    passes = 2

    def loss(self, model, batch, ostate, *, step, key, fraction):
        everybody = jnp.ones((model.config.num_layers, len(batch["tokens"])), jnp.int32)
        whole, _ = forward(model, batch | {"inputs": (batch.get("inputs") or {}) | {"depth": everybody}})
        logits, aux = forward(model, batch, train=True, step=step, key=key)
        weigh = lambda nats_BS: jnp.sum(nats_BS * batch["loss_weights"])
        log, target = jax.nn.log_softmax(logits), jax.nn.log_softmax(jax.lax.stop_gradient(whole))
        apart = weigh((jnp.exp(target) * (target - log)).sum(-1))
        task = weigh(cross_entropy(logits, batch["targets"]))
        scalars = {"loss": Stat.sum(task), "distillation": Stat.sum(apart)}
        scalars |= {"router_loss": Stat.sum(aux.total_loss() * fraction)}
        total = apart + self.config.next_token_coef * task + aux.total_loss() * fraction
        return total, {"scalars": scalars, "layers": aux.stats}
