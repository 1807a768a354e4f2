"""BlockFFN's schedule of a loss coefficient (arXiv 2507.08771, section 3.3): it follows the loss, upwards in earnest.

    every `every` steps, from step `start` on:  q = mean of the loss over this window / mean over the one before
    coefficient *= q            where q <= 1: the loss falls, less pressure is needed
    coefficient *= max(q, 1.025)  where q > 1
    never above `cap` times where it began

As in the authors' code the coefficient moves to its new value linearly over the next window. The loss is the mean over
layers; its coefficient in `model.losses` is where the schedule begins.
"""

import dataclasses

import jax.numpy as jnp

from moe_zoo.core.aux import Stat
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.train.objective import NextToken


@dataclasses.dataclass(frozen=True)
class ScheduledLossConfig:
    """`loss`: whose coefficient is scheduled. `start`, `every`: steps (paper: 1000, 100). `growth`: least factor up
    (1.025). `cap`: largest multiple of the initial coefficient (4, in the code only).
    """

    loss: str = "chunk_sparsity"
    start: int = 1000
    every: int = 100
    growth: float = 1.025
    cap: float = 4.0

    def validate(self, path: str) -> None:
        positive(self, path, "every")
        positive(self, path, "start", zero=True)
        for name in ("growth", "cap"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{join(path, name)}: expected a number >= 1, got {getattr(self, name)}")


class ScheduledLoss(NextToken):
    """Next-token loss and router losses, the coefficient of one of them following that loss."""

    Config = ScheduledLossConfig

    def init_state(self):
        """`scale` multiplies the coefficient; it is on its way from `origin` to `target`. `sum` is of this window's
        losses, `previous` the mean of the window before (0: none yet).
        """
        one, zero = jnp.float32(1), jnp.float32(0)
        return {
            "scale": one, "origin": one, "target": one, "sum": zero, "previous": zero, "steps": jnp.int32(0),
        }  # fmt: skip

    def extra(self, aux, ostate):
        name = self.config.loss
        if name not in aux.losses:
            given = ", ".join(sorted(aux.losses)) or "none"
            raise ConfigError(f"train.objective: 'scheduled_loss' schedules {name!r}, model.losses has: {given}")
        # the sum of the model's losses already holds it once
        return (ostate["scale"] - 1) * aux.losses[name], {f"{name}_scale": Stat.average(ostate["scale"])}

    def update(self, ostate, stats):
        config = self.config
        layers = [layer[config.loss].value() for layer in stats["layers"].values() if config.loss in layer]
        loss = jnp.concatenate([jnp.atleast_1d(value) for value in layers]).mean()
        steps, total = ostate["steps"] + 1, ostate["sum"] + loss
        closes = steps % config.every == 0
        mean, previous = total / config.every, ostate["previous"]
        turns = closes & (steps >= config.start) & (previous > 0)
        q = mean / jnp.where(previous > 0, previous, 1)
        goal = jnp.minimum(ostate["scale"] * jnp.where(q > 1, jnp.maximum(q, config.growth), q), config.cap)
        origin = jnp.where(turns, ostate["scale"], ostate["origin"])
        target = jnp.where(turns, goal, ostate["target"])
        # of the window that a turn opens, the first step already moves: on its last the target is reached
        part = (steps % config.every + 1) / config.every
        return {
            "scale": origin + (target - origin) * part, "origin": origin, "target": target,
            "sum": jnp.where(closes, 0, total), "previous": jnp.where(closes, mean, previous), "steps": steps,
        }  # fmt: skip
