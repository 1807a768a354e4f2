"""The residual block: x + mixer(norm(x)), then x + ffn(norm(x)); post-norm: x + norm(mixer(x)), x + norm(ffn(x))."""

import jax
from flax import nnx
from jaxtyping import Array

from moe_zoo.adapters.adapter import Tapped
from moe_zoo.blocks.chain import Chain
from moe_zoo.blocks.moe import MoE
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.layers.attention import View
from moe_zoo.layers.tap import below


class Block(nnx.Module):
    """A mixer over the sequence and a feed-forward part over the tokens, routed or dense.

    `placement`: norms before the branches ("pre") or behind them, inside the residual ("post", as in OLMo 2).
    `multiplier`: what a branch is multiplied by before it is added (Granite).
    """

    def __init__(self, *, mixer, ffn, mixer_norm, ffn_norm, placement: str = "pre", multiplier: float = 1.0):
        self.placement, self.multiplier = placement, multiplier
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = mixer_norm, ffn_norm

    @property
    def outer_residual(self) -> bool:
        """Whether the feed-forward part's output is added to the stream, or replaces it (Chain-of-Experts)."""
        return not isinstance(self.ffn, Chain) or self.ffn.chain.outer_residual

    @property
    def routed(self) -> bool:
        return isinstance(self.ffn, MoE)

    @property
    def adapted(self) -> bool:
        """Whether linear layers of it have adapters (`adapters.add_adapters`)."""
        return hasattr(self, "adapters")

    def each_adapter(self) -> dict:
        """By the path of the weight that it acts beside, below this block."""
        bank = getattr(getattr(self.ffn, "experts", None), "adapters", {})
        own = dict(self.adapters.items()) if self.adapted else {}
        return own | {f"ffn.experts.{name}": adapter for name, adapter in bank.items()}

    def adapter_path(self, name: str) -> str:
        """Where the adapter beside the weight of that path is, below this block."""
        return f"adapters.{name}" if name in self.adapters else name.replace("ffn.experts.", "ffn.experts.adapters.")

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
        tapped = Tapped(self.adapters, ctx) if self.adapted else None
        taps = {name: {"tap": below(name, tapped)} if self.adapted else {} for name in ("mixer", "ffn")}
        with jax.named_scope("mixer"):
            mixer = self.mixer.observed if self.shows_attention else self.mixer
            y, mixer_cache, *attention = mixer(
                self._before(self.mixer_norm, x), view, None if cache is None else cache["mixer"], at, **taps["mixer"]
            )
        x = self._add(x, y, self.mixer_norm)
        with jax.named_scope("ffn"):
            if not self.routed:
                inside = self._before(self.ffn_norm, x)
                y = self.adapters.feed_forward(self.ffn, inside, tapped) if self.adapted else self.ffn(inside)
                aux, carry, router_cache = Aux(), ctx.carry, None
            else:
                name, depth = self.ffn.router_name, ctx.carry
                router_cache = None if cache is None else cache["router"]
                mine = ctx.replace(cache=router_cache, carry=depth.get(name), shared=ctx.shared.get(name))
                mine = mine.replace(attention=attention[0] if attention else None)
                y, aux, routing = self.ffn(self._before(self.ffn_norm, x), mine, **taps["ffn"])
                router_cache = routing.cache
                carry = {**depth, name: routing.carry} if name in depth else depth
            if self.outer_residual:
                x = self._add(x, y, self.ffn_norm)
            else:
                x = y if self.placement == "pre" else self.ffn_norm(y)
        if self.adapted:
            aux = aux | tapped.aux(self._prefix)
        if cache is None:
            return x, aux, None, carry
        new = {"mixer": mixer_cache, "router": router_cache} if self.routed else {"mixer": mixer_cache}
        return x, aux, new, carry

    @property
    def _prefix(self) -> str:
        """Of the names of the adapters' statistics: the plain ones are a routed layer's."""
        return "adapter_" if self.routed else ""

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New buffer values, keyed by their path below this block. A base that is frozen has none."""
        if not self.adapted:
            return {f"ffn.{name}": value for name, value in self.ffn.after_step(stats).items()}
        own = {name.removeprefix(self._prefix): s for name, s in stats.items() if name.startswith(self._prefix)}
        return {f"adapters.{name}": value for name, value in self.adapters.after_step(own).items()}

    def _before(self, norm, x):
        return norm(x) if self.placement == "pre" else x

    def _add(self, x, y, norm):
        y = y if self.placement == "pre" else norm(y)
        return x + y if self.multiplier == 1.0 else x + y * self.multiplier

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        ffn = self.ffn.flops_per_token(rows_per_token) if self.routed else self.ffn.flops_per_token()
        looks = self.ffn.router.context_flops(context) if self.routed else 0
        adapters = self.adapters.flops_per_token() if self.adapted else 0
        return self.mixer.flops_per_token(context) + ffn + looks + adapters
