"""Chain-of-Experts (Wang et al., arXiv 2506.18945): the routed layer applied C times in a row to its own output.

    x_0 = x;   x_i = MoE_i(x_{i-1}) (+ x_{i-1}, the inner residual)   for i = 1..C;   y = x_C

Every iteration routes again, with a router of its own, over the same experts (and the same shared expert). As in the
authors' code, the block norms once, before the first iteration, and does not add its un-normed input back (the outer
residual): the way around the experts is the normed stream. One iteration without inner and with outer residual is the
plain routed layer, which are the defaults; the paper's layer is `iterations=2, inner_residual=true,
outer_residual=false`, K / 2 experts each time, raw softmax gates.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.blocks.moe import MoE, MoEConfig
from moe_zoo.core.aux import Aux, Stat, merge_stats
from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.tap import Tap


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """`iterations` C; `own_routers`: one each, or the same for all. `inner_residual` adds an iteration's input to its
    output, `outer_residual` the block's input to the block's output.
    """

    iterations: int = 1
    own_routers: bool = True
    inner_residual: bool = False
    outer_residual: bool = True

    def validate(self, path: str) -> None:
        positive(self, path, "iterations")
        if not (self.inner_residual or self.outer_residual):
            raise ConfigError(
                f"{join(path, 'outer_residual')}: false needs inner_residual=true, or no way leads around the experts"
            )


class Chain(MoE):
    """C iterations of a routed layer over one bank; `router` is the first iteration's, `later` are the others'."""

    def __init__(self, config: MoEConfig, chain: ChainConfig, *, hidden_size: int, out_scale: float):
        super().__init__(config, hidden_size=hidden_size, out_scale=out_scale)
        self.chain = chain
        if self.router.init_cache(1, 1) is not None and chain.iterations > 1:
            raise ConfigError(
                f"model.chain.iterations: {chain.iterations} with router {config.router.name!r}, which keeps a cache "
                "of earlier tokens: it has room for one iteration"
            )
        if chain.own_routers:
            make = lambda: config.router.make(config.dims(hidden_size))
            # a path ends in `router.NAME`, as that of the first does: patterns for routers find it
            self.later = nnx.List(nnx.Dict(router=make()) for _ in range(chain.iterations - 1))

    def routers(self) -> list:
        """The router of each iteration."""
        C = self.chain.iterations
        return [self.router, *(later.router for later in self.later)] if hasattr(self, "later") else [self.router] * C

    def __call__(
        self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext, tap: Tap | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, Routing]:
        if "given" in ctx.inputs and self.chain.iterations > 1:
            raise ValueError(f"a given decision says nothing about {self.chain.iterations} iterations of one layer")
        auxes, loads = [], []
        for i, router in enumerate(self.routers()):
            key = ctx.key if ctx.key is None or i == 0 else jax.random.fold_in(ctx.key, i)
            with jax.named_scope(f"iteration_{i}"):
                y_BSD, aux, routing = self.once(router, x_BSD, ctx.replace(key=key), tap)
            x_BSD = x_BSD + y_BSD if self.chain.inner_residual else y_BSD
            ctx = ctx.replace(carry=routing.carry)
            auxes.append(aux)
            loads += [aux.stats["load"].total] if "load" in aux.stats else []
        aux = merged(auxes)
        if loads:
            aux = aux | Aux(stats={"load_by_iteration": Stat.sum(jnp.stack(loads))})
        return x_BSD, aux, routing

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        found = [(path, router.from_corpus(counts_V, domains)) for path, router in self._owned()]
        return {name: value for path, values in found for name, value in _below(path, values)}

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """Each router's buffers from its own iteration's load; other statistics are of all iterations together."""
        new = {}
        for i, (path, router) in enumerate(self._owned()):
            mine = dict(stats)
            if "load_by_iteration" in stats and len(self._owned()) > 1:
                mine["load"] = Stat.sum(stats["load_by_iteration"].total[i])
            new.update(_below(path, router.after_step(mine)))
        return new

    def active(self) -> float:
        return min(self.num_experts, self.chain.iterations * self.router.active())

    def flops_per_token(self, rows_per_token: float | None = None) -> float:
        """Of all iterations; `rows_per_token` are one iteration's, as the statistic `experts_per_token` is."""
        return self.chain.iterations * super().flops_per_token(rows_per_token)

    def _owned(self) -> list:
        """(path, router) of the routers that have parameters of their own."""
        later = self.later if hasattr(self, "later") else []
        return [("router", self.router), *((f"later.{i}.router", one.router) for i, one in enumerate(later))]


def _below(path: str, values: dict) -> list:
    return [(f"{path}.{name}", value) for name, value in values.items()]


def merged(auxes: list[Aux]) -> Aux:
    """One layer's Aux from its iterations': losses add up, statistics merge (means are over iterations), the choices of
    the iterations stand side by side along K.
    """
    losses, stats = {}, auxes[0].stats
    for aux in auxes:
        for name, loss in aux.losses.items():
            losses[name] = losses.get(name, 0) + loss
    for aux in auxes[1:]:
        stats = merge_stats(stats, aux.stats)
    if len(auxes) == 1:
        return Aux(losses, auxes[0].terms, stats)
    terms = {}
    for name in auxes[0].terms:
        if name in ("router_experts", "router_gates"):
            terms[name] = jnp.concatenate([aux.terms[name] for aux in auxes], axis=1)
        elif name not in ("router_logits", "router_decision"):
            terms[name] = sum(aux.terms[name] for aux in auxes) / len(auxes)
    return Aux(losses, terms, stats)
