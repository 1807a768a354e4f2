"""The residual block: x + mixer(norm(x)), then x + ffn(norm(x)); post-norm: x + norm(mixer(x)), x + norm(ffn(x)); norms
in the stream: x = norm(x), x + mixer(x), x = norm(x), x + ffn(x).

Either branch may be missing.
"""

import jax
from flax import nnx

from moe_zoo.blocks.chain import Chain
from moe_zoo.blocks.moe import MoE
from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.attention import View


class Block(nnx.Module):
    """A mixer over the sequence and a feed-forward part over the tokens, routed or dense; None: a block without it.

    `placement`: norms before the branches ("pre"), behind them, inside the residual ("post", as in OLMo 2), or before
    the residual ("stream", as in MiniMax-01). `multiplier`: what a branch is multiplied by before it is added
    (Granite), `skip`: what the stream is.
    """

    def __init__(
        self, *, mixer, ffn, mixer_norm, ffn_norm, placement: str = "pre", multiplier: float = 1.0, skip: float = 1.0
    ):
        self.placement, self.multiplier, self.skip = placement, multiplier, skip
        if mixer is not None:
            self.mixer, self.mixer_norm = mixer, mixer_norm
        if ffn is not None:
            self.ffn, self.ffn_norm = ffn, ffn_norm

    @property
    def mixes(self) -> bool:
        return hasattr(self, "mixer")

    @property
    def outer_residual(self) -> bool:
        """Whether the feed-forward part's output is added to the stream, or replaces it (Chain-of-Experts)."""
        return not isinstance(self.ffn, Chain) or self.ffn.chain.outer_residual

    @property
    def routed(self) -> bool:
        return hasattr(self, "ffn") and isinstance(self.ffn, MoE)

    @property
    def shows_attention(self) -> bool:
        """Whether the router asks to see what the mixer did."""
        return self.routed and "attention" in self.ffn.router.requires

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        cache = {"mixer": self.mixer.init_cache(batch, max_seq, dtype) if self.mixes else None}
        if self.routed:
            cache["router"] = self.ffn.router.init_cache(batch, max_seq)
        return cache

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        mixer_cache, attention = None, []
        if self.mixes:
            with jax.named_scope("mixer"):
                mixer = self.mixer.observed if self.shows_attention else self.mixer
                x, seen = self._before(self.mixer_norm, x)
                y, mixer_cache, *attention = mixer(seen, view, None if cache is None else cache["mixer"], at)
            x = self._add(x, y, self.mixer_norm)
        if not hasattr(self, "ffn"):
            return x, Aux(), None if cache is None else {"mixer": mixer_cache}, ctx.carry
        with jax.named_scope("ffn"):
            x, seen = self._before(self.ffn_norm, x)
            if not self.routed:
                y, aux, carry, router_cache = self.ffn(seen), Aux(), ctx.carry, None
            else:
                name, depth = self.ffn.router_name, ctx.carry
                router_cache = None if cache is None else cache["router"]
                mine = ctx.replace(cache=router_cache, carry=depth.get(name), shared=ctx.shared.get(name))
                mine = mine.replace(attention=attention[0] if attention else None)
                y, aux, routing = self.ffn(seen, mine)
                router_cache = routing.cache
                carry = {**depth, name: routing.carry} if name in depth else depth
            if self.outer_residual:
                x = self._add(x, y, self.ffn_norm)
            else:
                x = self.ffn_norm(y) if self.placement == "post" else y
        if cache is None:
            return x, aux, None, carry
        new = {"mixer": mixer_cache, "router": router_cache} if self.routed else {"mixer": mixer_cache}
        return x, aux, new, carry

    def _before(self, norm, x):
        """(what a branch is added to, what it sees)."""
        if self.placement == "stream":
            x = norm(x)
            return x, x
        return x, norm(x) if self.placement == "pre" else x

    def _add(self, x, y, norm):
        y = norm(y) if self.placement == "post" else y
        x = x if self.skip == 1.0 else x * self.skip
        return x + y if self.multiplier == 1.0 else x + y * self.multiplier

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        flops = self.mixer.flops_per_token(context) if self.mixes else 0
        if self.routed:
            return flops + self.ffn.flops_per_token(rows_per_token) + self.ffn.router.context_flops(context)
        return flops + (self.ffn.flops_per_token() if hasattr(self, "ffn") else 0)
