"""The residual block: x + mixer(norm(x)), then x + ffn(norm(x)); post-norm: x + norm(mixer(x)), x + norm(ffn(x)); with
both there is a second norm per branch: x + after(mixer(norm(x))); norms in the stream: x = norm(x), x + mixer(x),
x = norm(x), x + ffn(x).

Either branch may be missing.
"""

import jax
from flax import nnx
from jaxtyping import Array

from moe_zoo.adapters.adapter import Tapped
from moe_zoo.blocks.chain import Chain
from moe_zoo.blocks.moe import MoE
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Buffer
from moe_zoo.layers.attention import View
from moe_zoo.layers.tanh_norm import PredictingBHyT
from moe_zoo.layers.tap import below


class Block(nnx.Module):
    """A mixer over the sequence and a feed-forward part over the tokens, routed or dense; None: a block without it.

    `placement`: norms before the branches ("pre"), behind them, inside the residual ("post", as in OLMo 2), "both",
    where `after` has the two behind, of the mixer and of the feed-forward part (AFMoE), or before the residual
    ("stream", as in MiniMax-01). `multiplier`: what a branch is multiplied by before it is added (Granite), `skip`:
    what the stream is.
    """

    def __init__(
        self,
        *,
        mixer,
        ffn,
        mixer_norm,
        ffn_norm,
        placement: str = "pre",
        after: tuple = (),
        multiplier: float = 1.0,
        skip: float = 1.0,
    ):
        self.placement, self.multiplier, self.skip = placement, multiplier, skip
        if mixer is not None:
            self.mixer, self.mixer_norm = mixer, mixer_norm
        if ffn is not None:
            self.ffn, self.ffn_norm = ffn, ffn_norm
        if placement == "both":
            self.mixer_post_norm, self.ffn_post_norm = after

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
    def selects(self) -> bool:
        """Whether only some tokens go through it (`blocks/selective.py`)."""
        return hasattr(self, "selector")

    @property
    def competes(self) -> bool:
        """Whether its tokens compete for it in training, which looks at later ones."""
        return False

    @property
    def causal(self) -> bool:
        """Whether at inference no token depends on later ones."""
        return not self.routed or self.ffn.router.causal

    @property
    def share(self) -> float:
        """The part of the tokens that go through it."""
        return 1.0

    def computed(self, seq_len: int) -> int:
        """How many tokens of a sequence of that length go through it in training."""
        return seq_len

    @property
    def adapted(self) -> bool:
        """Whether linear layers of it have adapters (`adapters.add_adapters`)."""
        return hasattr(self, "adapters")

    def each_adapter(self) -> dict:
        """By the path of the weight that it acts beside, below this block."""
        bank = getattr(getattr(getattr(self, "ffn", None), "experts", None), "adapters", {})
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
        cache = {"mixer": self.mixer.init_cache(batch, max_seq, dtype) if self.mixes else None}
        if self.routed:
            cache["router"] = self.ffn.router.init_cache(batch, max_seq)
        return cache

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        tapped = Tapped(self.adapters, ctx) if self.adapted else None
        squares = self._squares(x, view)
        x, mixer_cache, attention = self._mix(x, view, ctx, cache, at, tapped, squares[:1])
        aux, carry, router_cache = Aux(), ctx.carry, None
        if hasattr(self, "ffn"):
            with jax.named_scope("ffn"):
                x, seen = self._before(self.ffn_norm, x, squares[1:])
                if self.routed:
                    y, aux, router_cache, carry = self._route(seen, ctx, cache, attention, tapped)
                else:
                    y = self.ffn(seen) if tapped is None else self.adapters.feed_forward(self.ffn, seen, tapped)
                y = self._after("ffn", y)
                x = self._add(x, y) if self.outer_residual else y
        if tapped is not None:
            aux = aux | tapped.aux(self._prefix)
        carry = self._noted(attention, ctx, carry)
        if cache is None:
            return x, aux, None, carry
        new = {"mixer": mixer_cache, "router": router_cache} if self.routed else {"mixer": mixer_cache}
        return x, aux, new, carry

    def _noted(self, attention, ctx: RoutingContext, carry):
        """The carry, with what the next block wants to know of the attention in this one."""
        return carry

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

    @property
    def predicts(self) -> bool:
        """Whether what the second norm divides by is known before the mixer has run (BHyT)."""
        return self.mixes and hasattr(self, "ffn") and isinstance(self.ffn_norm, PredictingBHyT)

    @property
    def refreshes(self) -> bool:
        """Whether it has buffers that follow from its parameters; one that is frozen does not."""
        return self.predicts and isinstance(self.ffn_norm.growth, Buffer)

    def refreshed(self, step) -> dict[str, Array]:
        """Those buffers at `step`, keyed by their path below this block."""
        return {"ffn_norm.growth": self.ffn_norm.refreshed(self.mixer, step)} if self.refreshes else {}

    def _squares(self, x, view: View) -> tuple:
        """Mean squares that the two norms divide by, if they are known already."""
        return self.ffn_norm.squares(x, view.positions, self.mixer_norm) if self.predicts else ()

    def _mix(self, x, view: View, ctx: RoutingContext, cache, at, tapped: Tapped | None, square: tuple = ()):
        """(x with the mixer's branch, the mixer's cache, what it compared if the router asks for it)."""
        if not self.mixes:
            return x, None, None
        taps = {} if tapped is None or not self.mixer.linears else {"tap": below("mixer", tapped)}
        with jax.named_scope("mixer"):
            mixer = self.mixer.observed if self.shows_attention else self.mixer
            x, seen = self._before(self.mixer_norm, x, square)
            y, mixer_cache, *attention = mixer(seen, view, None if cache is None else cache["mixer"], at, **taps)
        return self._add(x, self._after("mixer", y)), mixer_cache, attention[0] if attention else None

    def _route(self, x, ctx: RoutingContext, cache, attention, tapped: Tapped | None):
        """(experts' output, Aux, the router's cache, carry of all routers)."""
        name, depth = self.ffn.router_name, ctx.carry
        router_cache = None if cache is None else cache["router"]
        mine = ctx.replace(cache=router_cache, carry=depth.get(name), shared=ctx.shared.get(name), attention=attention)
        y, aux, routing = self.ffn(x, mine, **({} if tapped is None else {"tap": below("ffn", tapped)}))
        return y, aux, routing.cache, {**depth, name: routing.carry} if name in depth else depth

    def _before(self, norm, x, square: tuple = ()):
        """(what a branch is added to, what it sees)."""
        if self.placement == "stream":
            x = norm(x)
            return x, x
        return x, x if self.placement == "post" else norm(x, *square)

    def _after(self, branch: str, y):
        """What a branch returns, as it is or normed."""
        name = {"post": f"{branch}_norm", "both": f"{branch}_post_norm"}.get(self.placement)
        return y if name is None else getattr(self, name)(y)

    def _add(self, x, y):
        x = x if self.skip == 1.0 else x * self.skip
        return x + y if self.multiplier == 1.0 else x + y * self.multiplier

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        flops = self.mixer.flops_per_token(context) if self.mixes else 0
        flops += self.adapters.flops_per_token() if self.adapted else 0
        if self.routed:
            return flops + self.ffn.flops_per_token(rows_per_token) + self.ffn.router.context_flops(context)
        return flops + (self.ffn.flops_per_token() if hasattr(self, "ffn") else 0)
