"""What a router is taught to prefer, from scores that are handed in (Read-ME, arXiv 2410.19123).

    L = mean over tokens of  a CE(G, argmax s; label smoothing) + (1 - a) CE(G, softmax(s))

G are the router's logits, s [T, E] how well each expert would serve the token: in the paper, how strongly its channels
answer in this layer of the dense model. Layers add up, so one router for all fits their average. The scores are inputs
from outside, `inputs={"target_scores": [L, T, E]}`; no gradient goes into them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import Dense, TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class RouteTargetsConfig:
    """`coef` multiplies the loss of each layer. `hard`: weight a of the best expert against the scores as a whole."""

    coef: float = 1.0
    hard: float = 0.75
    label_smoothing: float = 0.5

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)
        for name in ("hard", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{join(path, name)}: expected a number in [0, 1], got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class RouteTargets:
    """Cross-entropy of the router's logits to scores that are handed in, their best expert and their softmax."""

    Config: ClassVar = RouteTargetsConfig
    decisions: ClassVar = (TokenChoice, Dense)
    uses: ClassVar = "logits"

    config: RouteTargetsConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient. Without training and without scores it is 0."""
        if "target_scores" not in ctx.inputs:
            if ctx.train:
                raise ConfigError(
                    "model.losses.route_targets: training needs the model's inputs={'target_scores': [layers, tokens, "
                    "experts]}, and they were not given"
                )
            return jnp.zeros((), routing.logits.dtype)
        scores_TE = ctx.inputs["target_scores"]
        return route_targets(routing.logits, scores_TE, self.config.hard, self.config.label_smoothing, ctx.valid)


def route_targets(
    logits_TE: Float[Array, "T E"],
    scores_TE: Float[Array, "T E"],
    hard: float,
    label_smoothing: float,
    valid_T: Bool[Array, "T"] | None = None,
) -> Float[Array, ""]:
    """The mean over valid tokens; 0 if there is none. Of equal scores the lower expert is the best."""
    E = logits_TE.shape[-1]
    best_TE = jax.nn.one_hot(scores_TE.argmax(-1), E, dtype=logits_TE.dtype)
    smooth_TE = (1 - label_smoothing) * best_TE + label_smoothing / E
    target_TE = jax.lax.stop_gradient(hard * smooth_TE + (1 - hard) * jax.nn.softmax(scores_TE))
    loss_T = -(target_TE * jax.nn.log_softmax(logits_TE)).sum(-1)
    if valid_T is None:
        return loss_T.mean()
    return jnp.where(valid_T, loss_T, 0).sum() / jnp.maximum(valid_T.sum(), 1)
