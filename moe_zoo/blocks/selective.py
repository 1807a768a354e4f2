"""Blocks that some tokens go through while the others pass by on the residual stream (mixture of depths).

    T: the tokens that a selector picks, in order;   y = block(x[T]), attention among them alone, at their positions
    x'_i = (1 - w_i) x_i + w_i y_i for i in T,  x_i else

That is x + w (block(x) - x), written so that w = 1 is the block itself to the last bit. In training T are the C best of
a sequence: C is static, and so is all work. At inference each token is chosen by itself, so nothing depends on later
ones; how many are is data:

    without a cache    all are computed, and seen is who is chosen
    with a cache       of S new tokens min(S, places) are computed, those that are chosen first; the cache has places
                       for the chosen only. One step in which no sequence's token is chosen skips the block.

B batch, S sequence, C tokens that are computed, L places of the cache, D model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.blocks.block import Block
from moe_zoo.blocks.shortcut import Shortcut
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.depth.selector import Selection, Selector
from moe_zoo.layers.attention import View
from moe_zoo.routing.router import at_least_f32

#: fields of the context with an entry per token
_BY_TOKEN = ("positions", "segment_ids", "token_ids", "domain", "language", "modality")
#: inputs from outside with an entry per token
_GIVEN = ("given", "target_scores")


class SelectiveBlock(Block):
    """A block with a selector of who goes through it. Its parameters have the names that they have without one.

    `as_trained`: tokens compete outside training too, which looks at later ones.
    """

    def __init__(self, *, selector: Selector, **parts):
        super().__init__(**parts)
        self.selector = selector
        self.as_trained = False

    @property
    def causal(self) -> bool:
        return super().causal and not self.as_trained

    def computed(self, seq_len: int) -> int:
        return self.selector.size(seq_len)

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        L = self.selector.places(max_seq)
        return {"block": super().init_cache(batch, L, dtype), "taken": jnp.zeros((batch, L), bool)}

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        if found := [name for name in _GIVEN if name in ctx.inputs]:
            raise ValueError(f"{', '.join(found)}: of all tokens, and only some go through this block")
        with jax.named_scope("selector"):
            selection = self.selector(x, ctx)
        valid_BS = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid.reshape(x.shape[:2])
        if cache is not None:
            return self._continued(selection, x, view, ctx, cache, valid_BS)
        go_BS = wanted_BS = selection.chosen & valid_BS
        if self.selector.competes:
            at_BC = best(selection.scores, valid_BS, self.selector.size(x.shape[1]))
            wanted_BS = jnp.zeros(x.shape[:2], bool).at[_rows(at_BC), at_BC].set(True) & valid_BS
        learned = self.selector.learn(selection, wanted_BS, valid_BS)
        if self.selector.competes and (ctx.train or self.as_trained):
            go_BS, live_BC = wanted_BS, None if ctx.valid is None else take(valid_BS, at_BC)
            x, aux, _, carry = self._some(selection, x, view, ctx, at_BC, live_BC)
        else:
            x, aux, carry = self._chosen(selection, x, view, ctx, go_BS)
        return x, aux | learned | _counted(go_BS, valid_BS, ctx.record), None, carry

    def _through(self, x, view: View, ctx: RoutingContext, cache=None, at=None):
        """Through the block as it is without a selector."""
        return super().__call__(x, view, ctx, cache, at)

    def _chosen(self, selection: Selection, x, view: View, ctx: RoutingContext, go_BS):
        """All tokens computed, those that go through seen and changed."""
        seen = dataclasses.replace(view, valid=go_BS)
        y, aux, _, carry = self._through(x, seen, ctx.replace(valid=go_BS.reshape(-1)))
        keep = lambda new, old: jnp.where(_like(go_BS.reshape(-1), new), new, old)
        x = jnp.where(go_BS[..., None], blend(x, y, selection.weights), x)
        return x, aux, jax.tree.map(keep, carry, ctx.carry)

    def _some(self, selection: Selection, x, view: View, ctx: RoutingContext, at_BC, live_BC, cache=None, at=None):
        """The tokens `at_BC` through the block, those that are `live_BC` (None: all) seen and changed."""
        x_BCD = take(x, at_BC)
        view, few = _of_some(view, ctx, at_BC, live_BC)
        y_BCD, aux, cache, carry = self._through(x_BCD, view, few, cache, at)
        y_BCD = blend(x_BCD, y_BCD, take(selection.weights, at_BC))
        if live_BC is not None:
            y_BCD = jnp.where(live_BC[..., None], y_BCD, x_BCD)
        x = x.at[_rows(at_BC), at_BC].set(y_BCD, unique_indices=True)
        return x, aux, cache, _put_back(carry, few.carry, ctx.carry, at_BC, live_BC)

    def _continued(self, selection: Selection, x, view: View, ctx: RoutingContext, cache: dict, valid_BS):
        """The tokens that are chosen, as long as there are places; the first ones first, so that it is causal."""
        S, L = x.shape[1], cache["taken"].shape[1]
        used_B = cache["taken"].sum(1, dtype=jnp.int32)
        go_BS = selection.chosen & valid_BS
        go_BS &= used_B[:, None] + jnp.cumsum(go_BS, axis=1) <= L
        at_BC = jnp.argsort(~go_BS, axis=1, stable=True)[:, : min(S, L)]
        run = lambda: self._some(selection, x, view, ctx, at_BC, take(go_BS, at_BC), cache["block"], used_B)
        if S == 1:
            _, aux, _, _ = jax.eval_shape(run)
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux)
            run = lambda run=run: jax.lax.cond(go_BS.any(), run, lambda: (x, nothing, cache["block"], ctx.carry))
        x, aux, block, carry = run()
        taken = jnp.arange(L) < (used_B + go_BS.sum(1, dtype=jnp.int32))[:, None]
        return x, aux | _counted(go_BS, valid_BS, ctx.record), {"block": block, "taken": taken}, carry

    @property
    def share(self) -> float:
        return self.selector.config.capacity

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        """Of a token on average: `capacity` of them go through, and see `capacity` of the keys. `rows_per_token` are
        of a token that goes through.
        """
        through = super().flops_per_token(context * self.share, rows_per_token)
        return self.share * through + self.selector.flops_per_token()


class SelectiveShortcut(SelectiveBlock, Shortcut):
    """The same of a routed block with a dense one beside it."""


def best(scores_BS: Float[Array, "B S"], valid_BS: Bool[Array, "B S"], C: int) -> Int[Array, "B C"]:
    """Places of the C largest scores of each row, in order; padding comes after all that is real."""
    _, at_BC = jax.lax.top_k(jnp.where(valid_BS, jax.lax.stop_gradient(scores_BS), -jnp.inf), C)
    return jnp.sort(at_BC, axis=1)


def blend(x_BSD: Float[Array, "B S D"], y_BSD: Float[Array, "B S D"], weights_BS: Float[Array, "B S"]):
    """(1 - w) x + w y in float32 or wider."""
    w_BS1 = weights_BS[..., None]
    return (w_BS1 * at_least_f32(y_BSD) + (1 - w_BS1) * at_least_f32(x_BSD)).astype(x_BSD.dtype)


def take(x_BS: Array, at_BC: Int[Array, "B C"]) -> Array:
    """[B, S, ...] -> [B, C, ...]."""
    return jnp.asarray(x_BS)[_rows(at_BC), at_BC]


def _rows(at_BC):
    return jnp.arange(at_BC.shape[0])[:, None]


def _like(mask_T, x_T):
    return mask_T.reshape(-1, *[1] * (x_T.ndim - 1))


def _counted(go_BS, valid_BS, record: bool) -> Aux:
    """The share of tokens that went through; to be recorded, how often each did."""
    count = lambda hit: hit.sum().astype(jnp.float32)
    terms = {"depth_through": go_BS.astype(jnp.int32)} if record else {}
    return Aux(terms=terms, stats={"depth_share": Stat.mean(count(go_BS), count(valid_BS))})


def _of_some(view: View, ctx: RoutingContext, at_BC, live_BC) -> tuple[View, RoutingContext]:
    """What the block may look at, of the tokens `at_BC` alone."""
    B, C = at_BC.shape
    some = lambda a: None if a is None else take(a, at_BC)
    turned = lambda a: jnp.take_along_axis(a, at_BC[:, None, :, None], axis=2)
    view = dataclasses.replace(
        view, positions=take(view.positions, at_BC), segment_ids=some(view.segment_ids), valid=live_BC,
        rotary=jax.tree.map(turned, view.rotary),
    )  # fmt: skip
    of_token = lambda a: take(a.reshape(B, ctx.seq, *a.shape[1:]), at_BC).reshape(B * C, *a.shape[1:])
    fields = {name: of_token(value) for name in _BY_TOKEN if (value := getattr(ctx, name)) is not None}
    valid = None if live_BC is None else live_BC.reshape(-1)
    return view, ctx.replace(seq=C, valid=valid, carry=jax.tree.map(of_token, ctx.carry), **fields)


def _put_back(new, before, whole, at_BC, live_BC):
    """The carry of all tokens [T, ...], with what it is now for those that went through [B * C, ...]."""
    B, C = at_BC.shape

    def one(new, before, whole):
        if live_BC is not None:
            new = jnp.where(_like(live_BC.reshape(-1), new), new, before)
        rows = whole.reshape(B, -1, *whole.shape[1:])
        rows = rows.at[_rows(at_BC), at_BC].set(new.reshape(B, C, *new.shape[1:]), unique_indices=True)
        return rows.reshape(whole.shape)

    return jax.tree.map(one, new, before, whole)
