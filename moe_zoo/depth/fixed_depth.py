"""The same path for every sequence: layers that are left out, or run twice, whatever is asked.

    times of layer l = path_l in {0, 1, 2}

The control of selectors that look (Dr.LLM, FiRST) at the same budget, and plain removal of blocks.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_zoo.core.context import RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join
from moe_zoo.depth.sequence import Documents, SequenceSelector


@dataclasses.dataclass(frozen=True)
class FixedDepthConfig:
    """`path`: how often each layer of the model is executed; layers beyond its end are once."""

    path: tuple[int, ...] = ()

    def validate(self, path: str) -> None:
        if wrong := [times for times in self.path if times not in (0, 1, 2)]:
            raise ConfigError(f"{join(path, 'path')}: a layer is executed 0, 1 or 2 times, got {wrong[0]}")


class FixedDepth(SequenceSelector):
    """Every sequence takes the same path: the control of selectors that look at it."""

    Config = FixedDepthConfig
    repeats = True

    def decide(self, x_BSD: Float[Array, "B S D"], documents: Documents, ctx: RoutingContext) -> Int[Array, "B S"]:
        path = jnp.asarray([*self.config.path, 1], jnp.int32)
        return jnp.broadcast_to(path[jnp.minimum(ctx.layer, len(path) - 1)], x_BSD.shape[:2])
