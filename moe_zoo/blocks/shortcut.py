"""Shortcut-connected mixture of experts (ScMoE, arXiv 2404.05019), the layer of LongCat-Flash (arXiv 2509.01322).

    h = x + mixer(norm x);   u = norm h;   h = h + dense(u)
    y = h + second(h) + MoE(u)          second: a whole dense block, mixer and feed-forward

What experts return is added a block later, so that their communication has the second block to hide behind.
"""

import jax
from jaxtyping import Array

from moe_zoo.adapters.adapter import Tapped
from moe_zoo.blocks.block import Block
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.attention import View


class Shortcut(Block):
    """A routed block with a dense network beside its experts, and a dense block before their sum is added."""

    def __init__(self, *, dense, second: Block, **parts):
        super().__init__(**parts)
        self.dense, self.second = dense, second

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        return super().init_cache(batch, max_seq, dtype) | {"second": self.second.init_cache(batch, max_seq, dtype)}

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        tapped = Tapped(self.adapters, ctx) if self.adapted else None
        squares = self._squares(x, view)
        x, mixer_cache, attention, _ = self._mix(x, view, ctx, cache, at, tapped, squares[:1])
        x, u = self._before(self.ffn_norm, x, squares[1:])
        with jax.named_scope("ffn"):
            routed, aux, router_cache, carry = self._route(u, ctx, cache, attention, tapped)
            x = self._add(x, self._after("ffn", self.dense(u)))
        with jax.named_scope("second"):
            x, _, second, _ = self.second(x, view, ctx, None if cache is None else cache["second"], at)
        x = self._add(x, routed)
        if tapped is not None:
            aux = aux | tapped.aux(self._prefix)
        new = None if cache is None else {"mixer": mixer_cache, "router": router_cache, "second": second}
        return x, aux, new, carry

    def refreshed(self, step) -> dict[str, Array]:
        """Buffers that follow from parameters, of both blocks, keyed by their path below this one."""
        return super().refreshed(step) | {
            f"second.{name}": value for name, value in self.second.refreshed(step).items()
        }

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        more = self.dense.flops_per_token() + self.second.flops_per_token(context)
        return super().flops_per_token(context, rows_per_token) + more
