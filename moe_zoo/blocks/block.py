"""The pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x))."""

import jax
from flax import nnx

from moe_zoo.blocks.moe import MoE
from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.attention import View


class Block(nnx.Module):
    """A mixer over the sequence and a feed-forward part over the tokens, routed or dense."""

    def __init__(self, *, mixer, ffn, mixer_norm, ffn_norm):
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = mixer_norm, ffn_norm

    @property
    def routed(self) -> bool:
        return isinstance(self.ffn, MoE)

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        cache = {"mixer": self.mixer.init_cache(batch, max_seq, dtype)}
        if self.routed:
            cache["router"] = self.ffn.router.init_cache(batch, max_seq)
        return cache

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        with jax.named_scope("mixer"):
            y, mixer_cache = self.mixer(self.mixer_norm(x), view, None if cache is None else cache["mixer"], at)
        x = x + y
        with jax.named_scope("ffn"):
            if not self.routed:
                x, aux, carry, router_cache = x + self.ffn(self.ffn_norm(x)), Aux(), ctx.carry, None
            else:
                name, depth = self.ffn.router_name, ctx.carry
                router_cache = None if cache is None else cache["router"]
                mine = ctx.replace(cache=router_cache, carry=depth.get(name), shared=ctx.shared.get(name))
                y, aux, routing = self.ffn(self.ffn_norm(x), mine)
                x, router_cache = x + y, routing.cache
                carry = {**depth, name: routing.carry} if name in depth else depth
        if cache is None:
            return x, aux, None, carry
        new = {"mixer": mixer_cache, "router": router_cache} if self.routed else {"mixer": mixer_cache}
        return x, aux, new, carry

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        ffn = self.ffn.flops_per_token(rows_per_token) if self.routed else self.ffn.flops_per_token()
        return self.mixer.flops_per_token(context) + ffn
