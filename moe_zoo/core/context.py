"""All that a router may look at besides its tokens, and what it returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.aux import Aux
from moe_zoo.core.decision import Decision
from moe_zoo.core.sight import Sight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionView:
    """What the attention below a routed layer compared and mixed: S tokens of this call over L keys, which are the
    cache's if there is one. Head n of N has the keys and values of head n // (N / M); scores are q k, `q` being scaled.

    `out`: the sum of all heads' outputs, before bias, norm and residual. `window`: of a sliding window.
    """

    q: Float[Array, "B N S H"]
    k: Float[Array, "B M L H"]
    v: Float[Array, "B M L V"]
    o: Float[Array, "N V D"]
    out: Float[Array, "B S D"]
    sight: Sight
    window: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingContext:
    """One per layer call. Token fields are flattened (T = batch * seq). A field that is None was not provided.

    `mesh` is for dispatchers; routers see the global view. `record`: layers hand out what was routed, token by token.

    `carry` runs through the depth, `cache` through decoding time, `shared` is a module of all layers, or what it has
    made before them; a router sees its own pytrees, a block all routers' by name, and the selectors' as "depth". `at`:
    the place in the caches of this call's first token. `attention`: of the same block, for routers that require it.
    `inputs` are per-layer arrays from outside (`router_bias`, `given`, `target_scores`, `depth`), sliced by the scan
    beside the parameters. `prompt`: the tokens that a decision for a whole sequence may look at.
    """

    batch: int = dataclasses.field(metadata={"static": True})
    seq: int = dataclasses.field(metadata={"static": True})
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    num_domains: int = dataclasses.field(default=0, metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    record: bool = dataclasses.field(default=False, metadata={"static": True})
    valid: Bool[Array, "T"] | None = None
    positions: Int[Array, "T"] | None = None
    segment_ids: Int[Array, "T"] | None = None
    token_ids: Int[Array, "T"] | None = None
    domain: Int[Array, "T"] | None = None
    language: Int[Array, "T"] | None = None
    modality: Int[Array, "T"] | None = None
    prompt: Bool[Array, "T"] | None = None
    step: Int[Array, ""] | None = None
    layer: Int[Array, ""] | None = None
    key: Any = None
    carry: Any = dataclasses.field(default_factory=dict)
    cache: Any = None
    at: Int[Array, ""] | None = None
    attention: AttentionView | None = None
    shared: Any = dataclasses.field(default_factory=dict)
    inputs: dict[str, Array] = dataclasses.field(default_factory=dict)

    def replace(self, **changes) -> "RoutingContext":
        return dataclasses.replace(self, **changes)


# Fields of the context that a model can supply; `Router.requires` may name any of them.
PROVIDABLE = (
    "valid", "positions", "segment_ids", "token_ids", "domain", "language", "modality", "step", "key", "attention",
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """A decision, and what losses and analysis need to know about how it was reached.

    `logits` and `probs` are float32 and the ones before any balancing bias; None for routers that have none. `copy`:
    how much of the token itself is added to what its experts return.
    """

    decision: Decision
    logits: Float[Array, "T E"] | None = None
    probs: Float[Array, "T E"] | None = None
    copy: Float[Array, "T"] | None = None
    carry: Any = None
    cache: Any = None
    aux: Aux = dataclasses.field(default_factory=Aux)


def keys_by_place(key: Array, ctx: RoutingContext, each_token: bool = True) -> Array:
    """A random key for every token [T], by what it is called: row, document, position; without `each_token` one for
    each document. So it does not matter how many tokens are drawn for at once.
    """
    T = ctx.batch * ctx.seq
    row_T, place_T = jnp.divmod(jnp.arange(T, dtype=jnp.int32), ctx.seq)
    # a row that is not packed is a row of one document
    names = [row_T, jnp.ones_like(row_T) if ctx.segment_ids is None else ctx.segment_ids]
    if each_token:
        names.append(place_T if ctx.positions is None else ctx.positions)
    keys_T = jnp.broadcast_to(key, T)
    for name_T in names:
        keys_T = jax.vmap(jax.random.fold_in)(keys_T, name_T)
    return keys_T
