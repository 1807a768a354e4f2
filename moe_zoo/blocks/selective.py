"""Blocks that some tokens go through while the others pass by on the residual stream (mixture of depths).

    T: the tokens that a selector picks, in order;   y = block(x[T]), attention among them alone, at their positions
    x'_i = (1 - w_i) x_i + w_i y_i for i in T,  x_i else

That is x + w (block(x) - x), written so that w = 1 is the block itself to the last bit. In training T are the C best of
a sequence, or of the whole batch (`Selector.over_batch`): C is static, and so is all work. At inference each token is
chosen by itself, so nothing depends on later ones; how many are is data:

    without a cache    all are computed, and seen is who is chosen
    with a cache       of S new tokens min(S, places) are computed, those that are chosen first; the cache has places
                       for the chosen only. One step in which no sequence's token is chosen skips the block.

A selector of whole sequences (`Selector.whole`) has them skip the block, go through it, or go through it again, with
another cache for that. All are computed and those that go kept; with a cache nothing is if no sequence of the batch
goes. Where those that pass by leave keys (`Selector.leaves_keys`), the cache has places for all.

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
from moe_zoo.depth.attention import DEPTH, received
from moe_zoo.depth.selector import Selection, Selector
from moe_zoo.layers.attention import View
from moe_zoo.routing.router import at_least_f32

#: fields of the context with an entry per token
_BY_TOKEN = ("positions", "segment_ids", "token_ids", "domain", "language", "modality", "prompt")
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
        return super().causal and not (self.as_trained and self.competes)

    @property
    def competes(self) -> bool:
        return self.selector.competes

    def computed(self, seq_len: int) -> int:
        return self.selector.size(seq_len)

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        L = self.selector.places(max_seq)
        cache = {name: super(SelectiveBlock, self).init_cache(batch, L, dtype) for name in self._passes}
        if not (self.selector.whole or self.selector.leaves_keys):
            cache["taken"] = jnp.zeros((batch, L), bool)
        return cache | {"selector": self.selector.init_cache(batch, max_seq)}

    @property
    def _passes(self) -> tuple[str, ...]:
        """Names of the caches: of the block, and of its repetition if there may be one."""
        return ("block", "again") if self.selector.repeats else ("block",)

    def __call__(self, x, view: View, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry of the router)."""
        found = [name for name in _GIVEN if name in ctx.inputs]
        if found and not self.selector.whole:
            raise ValueError(f"{', '.join(found)}: of all tokens, and only some go through this block")
        with jax.named_scope("selector"):
            selection = self.selector(x, ctx.replace(cache=None if cache is None else cache["selector"]))
        valid_BS = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid.reshape(x.shape[:2])
        if self.selector.whole:
            return self._whole(selection, x, view, ctx, cache, at, valid_BS)
        if cache is not None and self.selector.leaves_keys:
            return self._asking(selection, x, view, ctx, cache, at, valid_BS)
        if cache is not None:
            return self._continued(selection, x, view, ctx, cache, valid_BS)
        go_BS = wanted_BS = selection.chosen & valid_BS
        if self.selector.competes:
            together = _as_one_row if self.selector.over_batch else lambda a: a
            scores_GS, valid_GS = together(selection.scores), together(valid_BS)
            at_GC = best(scores_GS, valid_GS, self.selector.size(scores_GS.shape[1]))
            wanted_GS = jnp.zeros(scores_GS.shape, bool).at[_rows(at_GC), at_GC].set(True) & valid_GS
            wanted_BS = wanted_GS.reshape(x.shape[:2])
        learned = self.selector.learn(selection, wanted_BS, valid_BS)
        if self.selector.competes and (ctx.train or self.as_trained):
            go_BS, live_GC = wanted_BS, None if ctx.valid is None else take(valid_GS, at_GC)
            seen = _together(view, ctx) if self.selector.over_batch else (view, ctx)
            y, aux, _, carry = self._some(together(selection.weights), together(x), *seen, at_GC, live_GC)
            x = y.reshape(x.shape)
        else:
            seen_BS, weights_BS = None, selection.weights
            if selection.seen is not None:
                seen_BS, weights_BS = selection.seen & valid_BS, jnp.where(valid_BS, weights_BS, 0)
            x, aux, _, carry = self._chosen(weights_BS, x, view, ctx, go_BS, seen_BS=seen_BS)
        return x, aux | selection.aux | learned | _counted(go_BS, valid_BS, ctx.record), None, carry

    def _through(self, x, view: View, ctx: RoutingContext, cache=None, at=None):
        """Through the block as it is without a selector."""
        return super().__call__(x, view, ctx, cache, at)

    def _whole(self, selection: Selection, x, view: View, ctx: RoutingContext, cache, at, valid_BS):
        """Once, and those that go again once more: with all of a sequence's tokens or none."""
        aux, carry, new, count = selection.aux, ctx.carry, {"selector": selection.cache}, 0
        for name, chosen_BS in zip(self._passes, (selection.chosen, selection.again)):
            go_BS = chosen_BS & valid_BS
            weights = selection.weights if name == "block" else jnp.ones_like(selection.weights)
            old, now = None if cache is None else cache[name], ctx.replace(carry=carry)
            run = lambda x=x, now=now, go=go_BS, w=weights, old=old: self._chosen(w, x, view, now, go, old, at)
            idle = lambda x=x, old=old, carry=carry: (x, old, carry)
            x, more, new[name], carry = run() if cache is None else _unless_nobody(go_BS, run, idle)
            aux, count = _both(aux, more), count + go_BS
        return x, aux | _counted(count, valid_BS, ctx.record), None if cache is None else new, carry

    def _chosen(self, weights_BS, x, view: View, ctx: RoutingContext, go_BS, cache=None, at=None, seen_BS=None):
        """All tokens computed, those that go through seen and changed. `seen_BS`: these are seen instead, and all
        change by their weights.
        """
        seen = dataclasses.replace(view, valid=go_BS if seen_BS is None else seen_BS)
        y, aux, cache, carry = self._through(x, seen, ctx.replace(valid=go_BS.reshape(-1)), cache, at)
        keep = lambda new, old: jnp.where(_like(go_BS.reshape(-1), new), new, old)
        kept = jax.tree.map(keep, carry, ctx.carry)
        if seen_BS is not None and DEPTH in carry:  # of all tokens whose keys are seen
            kept |= {DEPTH: carry[DEPTH]}
        y = blend(x, y, weights_BS)
        return jnp.where(go_BS[..., None], y, x) if seen_BS is None else y, aux, cache, kept

    def _asking(self, selection: Selection, x, view: View, ctx: RoutingContext, cache, at, valid_BS):
        """All tokens leave keys and values, and those that go through do the rest."""
        go_BS, weights_BS = selection.chosen & valid_BS, jnp.where(valid_BS, selection.weights, 0)
        run = lambda: self._chosen(weights_BS, x, view, ctx, go_BS, cache["block"], at, valid_BS)
        idle = lambda: (x, self._remembered(x, view, cache["block"], at, valid_BS), ctx.carry)
        x, aux, block, carry = run() if x.shape[1] > 1 else _unless_nobody(go_BS, run, idle)
        return x, aux | _counted(go_BS, valid_BS, ctx.record), {"block": block, "selector": selection.cache}, carry

    def _remembered(self, x, view: View, cache: dict, at, valid_BS) -> dict:
        """The block's cache with the keys and values of tokens that do not ask."""
        _, seen = self._before(self.mixer_norm, x)
        view = dataclasses.replace(view, valid=valid_BS)
        return cache | {"mixer": self.mixer.remember(seen, view, cache["mixer"], at)}

    @property
    def shows_attention(self) -> bool:
        return super().shows_attention or self.selector.reads_attention

    def _noted(self, attention, ctx: RoutingContext, carry):
        if not self.selector.reads_attention:
            return carry
        shaped = lambda a: None if a is None else a.reshape(ctx.batch, ctx.seq)
        got_BS = received(attention, shaped(ctx.valid), shaped(ctx.prompt), shaped(carry[DEPTH]))
        return carry | {DEPTH: got_BS.reshape(-1)}

    def _some(self, weights_BS, x, view: View, ctx: RoutingContext, at_BC, live_BC, cache=None, at=None):
        """The tokens `at_BC` through the block, those that are `live_BC` (None: all) seen and changed."""
        x_BCD = take(x, at_BC)
        view, few = _of_some(view, ctx, at_BC, live_BC)
        y_BCD, aux, cache, carry = self._through(x_BCD, view, few, cache, at)
        y_BCD = blend(x_BCD, y_BCD, take(weights_BS, at_BC))
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
        run = lambda: self._some(selection.weights, x, view, ctx, at_BC, take(go_BS, at_BC), cache["block"], used_B)
        idle = lambda: (x, cache["block"], ctx.carry)
        x, aux, block, carry = run() if S > 1 else _unless_nobody(go_BS, run, idle)
        taken = jnp.arange(L) < (used_B + go_BS.sum(1, dtype=jnp.int32))[:, None]
        new = {"block": block, "taken": taken, "selector": selection.cache}
        return x, aux | _counted(go_BS, valid_BS, ctx.record), new, carry

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        moves = self.adapted or not self.selector.retrofits
        return super().after_step(stats) if moves else {}

    @property
    def share(self) -> float:
        return self.selector.share

    def flops_per_token(self, context: float, rows_per_token: float | None = None) -> float:
        """Of a token on average: `share` of them go through, and see `share` of the keys, or all where all leave some.
        `rows_per_token` are of a token that goes through.
        """
        share, keys = self.share, self.selector.leaves_keys
        through = super().flops_per_token(context if keys else context * share, rows_per_token)
        left = (1 - share) * self.mixer.flops_to_remember() if keys else 0
        return share * through + left + self.selector.flops_per_token()


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


def _as_one_row(a_BS: Array) -> Array:
    """[B, S, ...] -> [1, B * S, ...]."""
    return a_BS.reshape(1, -1, *a_BS.shape[2:])


def _together(view: View, ctx: RoutingContext) -> tuple[View, RoutingContext]:
    """The batch as one long row, in which sequences do not see each other."""
    rows_B1 = jnp.arange(ctx.batch)[:, None]
    segments_BS = jnp.broadcast_to(rows_B1, (ctx.batch, ctx.seq))
    if view.segment_ids is not None:
        segments_BS = segments_BS * (view.segment_ids.max() + 1) + view.segment_ids
    segments_1T = _as_one_row(segments_BS)
    view = dataclasses.replace(
        view, positions=_as_one_row(view.positions), segment_ids=segments_1T,
        valid=None if view.valid is None else _as_one_row(view.valid),
        rotary=jax.tree.map(lambda a: a.reshape(1, a.shape[1], -1, a.shape[3]), view.rotary),
    )  # fmt: skip
    return view, ctx.replace(batch=1, seq=ctx.batch * ctx.seq, segment_ids=segments_1T[0])


def _unless_nobody(go_BS, run, idle):
    """`run()`, or if nobody goes what `idle` makes (x, cache, carry), without losses."""
    _, aux, _, _ = jax.eval_shape(run)

    def otherwise():
        x, cache, carry = idle()
        return x, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux), cache, carry

    return jax.lax.cond(go_BS.any(), run, otherwise)


def _both(aux: Aux, more: Aux) -> Aux:
    """What was said so far and by another pass: losses add up, statistics merge; terms are of the first one."""
    merged = {name: s.merge(aux.stats[name]) if name in aux.stats else s for name, s in more.stats.items()}
    return Aux((aux | Aux(more.losses)).losses, {**more.terms, **aux.terms}, {**aux.stats, **merged})


def _rows(at_BC):
    return jnp.arange(at_BC.shape[0])[:, None]


def _like(mask_T, x_T):
    return mask_T.reshape(-1, *[1] * (x_T.ndim - 1))


def _counted(times_BS, valid_BS, record: bool) -> Aux:
    """The share of tokens that went through; to be recorded, how often each did."""
    count = lambda hit: hit.sum().astype(jnp.float32)
    terms = {"depth_through": jnp.asarray(times_BS, jnp.int32)} if record else {}
    return Aux(terms=terms, stats={"depth_share": Stat.mean(count(times_BS), count(valid_BS))})


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
