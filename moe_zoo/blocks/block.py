"""The residual block: x + mixer(norm(x)), then x + ffn(norm(x)); post-norm: x + norm(mixer(x)), x + norm(ffn(x)).

With both there is a second norm per branch: x + after(mixer(norm(x))).
"""

import jax
from flax import nnx

from moe_zoo.blocks.chain import Chain
from moe_zoo.blocks.moe import MoE
from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.attention import View


class Block(nnx.Module):
    """A mixer over the sequence and a feed-forward part over the tokens, routed or dense.

    `placement`: norms before the branches ("pre"), behind them, inside the residual ("post", as in OLMo 2), or "both",
    where `after` has the two behind, of the mixer and of the feed-forward part (AFMoE).
    `multiplier`: what a branch is multiplied by before it is added (Granite).
    """

    def __init__(
        self, *, mixer, ffn, mixer_norm, ffn_norm, placement: str = "pre", after: tuple = (), multiplier: float = 1.0
    ):
        self.placement, self.multiplier = placement, multiplier
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = mixer_norm, ffn_norm
        if placement == "both":
            self.mixer_post_norm, self.ffn_post_norm = after

    @property
    def outer_residual(self) -> bool:
        """Whether the feed-forward part's output is added to the stream, or replaces it (Chain-of-Experts)."""
        return not isinstance(self.ffn, Chain) or self.ffn.chain.outer_residual

    @property
    def routed(self) -> bool:
        return isinstance(self.ffn, MoE)

    @property
    def shows_attention(self) -> bool:
        """Whether the router asks to see what the mixer did."""
        return self.routed and "attention" in self.ffn.router.requires

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        cache = {"mixer": self.mixer.init_cache(batch, max_seq, dtype)}
        if self.routed:
            cache["router"] = self.ffn.router.init_cache(batch, max_seq)
        return cache

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        x, mixer_cache, attention = self._mix(x, view, cache, at)
        with jax.named_scope("ffn"):
            if not self.routed:
                y, aux, carry, router_cache = self.ffn(self._before(self.ffn_norm, x)), Aux(), ctx.carry, None
            else:
                y, aux, router_cache, carry = self._route(self._before(self.ffn_norm, x), ctx, cache, attention)
            if self.outer_residual:
                x = self._add(x, self._after("ffn", y))
            else:
                x = self._after("ffn", y)
        if cache is None:
            return x, aux, None, carry
        new = {"mixer": mixer_cache, "router": router_cache} if self.routed else {"mixer": mixer_cache}
        return x, aux, new, carry

    def _mix(self, x, view: View, cache, at):
        """(x with the mixer's branch, the mixer's cache, what it compared if the router asks for it)."""
        with jax.named_scope("mixer"):
            mixer = self.mixer.observed if self.shows_attention else self.mixer
            y, mixer_cache, *attention = mixer(
                self._before(self.mixer_norm, x), view, None if cache is None else cache["mixer"], at
            )
        return self._add(x, self._after("mixer", y)), mixer_cache, attention[0] if attention else None

    def _route(self, x, ctx: RoutingContext, cache, attention):
        """(experts' output, Aux, the router's cache, carry of all routers)."""
        name, depth = self.ffn.router_name, ctx.carry
        router_cache = None if cache is None else cache["router"]
        mine = ctx.replace(cache=router_cache, carry=depth.get(name), shared=ctx.shared.get(name), attention=attention)
        y, aux, routing = self.ffn(x, mine)
        return y, aux, routing.cache, {**depth, name: routing.carry} if name in depth else depth

    def _before(self, norm, x):
        return x if self.placement == "post" else norm(x)

    def _after(self, branch: str, y):
        """What a branch returns, as it is or normed."""
        names = {"pre": None, "post": f"{branch}_norm", "both": f"{branch}_post_norm"}
        name = names[self.placement]
        return y if name is None else getattr(self, name)(y)

    def _add(self, x, y):
        return x + y if self.multiplier == 1.0 else x + y * self.multiplier

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        ffn = self.ffn.flops_per_token(rows_per_token) if self.routed else self.ffn.flops_per_token()
        looks = self.ffn.router.context_flops(context) if self.routed else 0
        return self.mixer.flops_per_token(context) + ffn + looks
