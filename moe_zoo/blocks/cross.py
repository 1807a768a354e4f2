"""The block of a decoder behind an encoder: x + mixer(norm(x)), x + cross(norm(x), memory), x + ffn(norm(x))."""

import jax

from moe_zoo.blocks.block import Block
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.cross_attention import PairView


class CrossBlock(Block):
    """Between the mixer and the feed-forward part it looks at what the encoder made of the other sequence.

    Its cache has "cross" besides: keys and values of that, which stay as they are.
    """

    def __init__(self, *, cross, cross_norm, **parts):
        super().__init__(**parts)
        self.cross, self.cross_norm = cross, cross_norm

    def __call__(self, x, view: PairView, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        x, aux, new, carry = super().__call__(x, view, ctx, cache, at)
        return x, aux, None if cache is None else {**new, "cross": cache["cross"]}, carry

    def _mix(self, x, view: PairView, ctx: RoutingContext, cache, at, tapped, square: tuple = ()):
        x, *rest = super()._mix(x, view, ctx, cache, at, tapped, square)
        with jax.named_scope("cross"):
            kv = self.cross.keys_values(view.memory) if cache is None else cache["cross"]
            y = self.cross(self.cross_norm(x), kv, view.memory_valid)
        return self._add(x, y), *rest

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        """As if each token of the other sequence were seen by one of this."""
        return super().flops_per_token(context, rows_per_token) + self.cross.flops_per_token(context)
