"""Selectors that decide for a whole sequence, once, by its prompt: skip a block, go through it, or go twice.

    times = decide(hidden states of the prompt) in {0, 1, 2};   0: x,   1: block(x),   2: block(block(x))

A layer that is skipped is skipped for the prompt too, so the next layer's selector reads what the last executed one has
left. While decoding, the first call on a cache has the prompt; what was decided then holds for every later token.

Without a cache the prompt is what the model's call says (`prompt`), of each packed document on its own; if it says
nothing, all tokens are the prompt, and then the decision, and every token by it, depends on the last of them.

A path that is given (`inputs["depth"]`, i32[L, B]: how often each row goes through each layer) is followed instead.

B batch, S sequence, D model, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.context import RoutingContext
from moe_zoo.depth.selector import Retrofit, Selection


@dataclasses.dataclass(frozen=True)
class Documents:
    """Where each token's own document begins in its row, which tokens are of a prompt, and, `single`, whether every row
    is one document.
    """

    start: Int[Array, "B S"]
    prompt: Bool[Array, "B S"]
    single: bool

    @classmethod
    def of(cls, ctx: RoutingContext) -> "Documents":
        shaped = lambda a: a.reshape(ctx.batch, ctx.seq)
        prompt_BS = jnp.ones((ctx.batch, ctx.seq), bool) if ctx.prompt is None else shaped(ctx.prompt)
        if ctx.valid is not None:
            prompt_BS &= shaped(ctx.valid)
        if ctx.segment_ids is None:
            return cls(jnp.zeros(prompt_BS.shape, jnp.int32), prompt_BS, True)
        segments_BS = shaped(ctx.segment_ids)
        opens_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1]) != 0
        places_S = jnp.arange(ctx.seq, dtype=jnp.int32)
        return cls(jax.lax.cummax(jnp.where(opens_BS, places_S, 0), axis=1), prompt_BS, False)

    def sums(self, values_BW: Float[Array, "B W ..."]) -> Float[Array, "B S ..."]:
        """What the first W places of each row hold, added up over each token's own document."""
        W = values_BW.shape[1]
        return self._own(added(values_BW, self.start[:, :W], self.start.shape[1]))

    def _own(self, totals_BS):
        return totals_BS[jnp.arange(totals_BS.shape[0])[:, None], self.start]


def added(values_BW: Float[Array, "B W ..."], to_BW: Int[Array, "B W"], places: int) -> Float[Array, "B P ..."]:
    """Each row's values, added up at the places that `to_BW` names; one beyond the last is nowhere."""
    return jax.vmap(lambda values, to: jax.ops.segment_sum(values, to, places))(values_BW, to_BW)


class SequenceSelector(Retrofit):
    """A subclass says in `decide` how often the sequence of each token goes through, and may have a training form of
    its own in `learning`.
    """

    whole = True

    def __call__(self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext) -> Selection:
        """Raises ValueError for a path that is given of packed documents."""
        given_B, shape = ctx.inputs.get("depth"), x_BSD.shape[:2]
        if given_B is not None and ctx.segment_ids is not None:
            raise ValueError("inputs['depth'] with segment_ids: a path is a row's; give one document per row")
        if ctx.train and self.trains and (found := self.learning(x_BSD, given_B, ctx)) is not None:
            return found
        memory = ctx.cache
        if given_B is not None:
            times_BS = jnp.broadcast_to(given_B[:, None], shape)
            memory = None if memory is None else {"times": given_B.astype(jnp.int32), "decided": given_B >= 0}
        elif memory is None:
            times_BS = self.decide(x_BSD, Documents.of(ctx), ctx)
        else:
            memory = self._remembered(x_BSD, memory, ctx)
            times_BS = jnp.broadcast_to(memory["times"][:, None], shape)
        return self.selection(times_BS, cache=memory)

    def selection(self, times_BS: Int[Array, "B S"], **more) -> Selection:
        """Of how often each token goes through."""
        again = {"again": times_BS > 1} if self.repeats else {}
        return Selection(None, times_BS > 0, jnp.ones(times_BS.shape, jnp.float32), **again, **more)

    def decide(self, x_BSD: Float[Array, "B S D"], documents: Documents, ctx: RoutingContext) -> Int[Array, "B S"]:
        """How often each token's document goes through, by the tokens of its prompt."""
        raise NotImplementedError(f"selector {type(self).__name__} does not define decide")

    def learning(self, x_BSD: Float[Array, "B S D"], given_B: Int[Array, "B"] | None, ctx: RoutingContext):
        """What it says in training instead, if that differs: a Selection, with its losses."""
        return None

    def _remembered(self, x_BSD, memory, ctx: RoutingContext):
        """Those that have not decided yet decide by this call's tokens; if all have, nothing is computed."""

        def fresh():
            documents = Documents.of(ctx)
            times_B = self.decide(x_BSD, documents, ctx)[:, 0]
            return {
                "times": jnp.where(memory["decided"], memory["times"], times_B),
                "decided": memory["decided"] | documents.prompt.any(1),
            }

        return jax.lax.cond(memory["decided"].all(), lambda: memory, fresh)

    def init_cache(self, batch: int, max_seq: int):
        """How often each row goes through, once that is decided."""
        return {"times": jnp.zeros(batch, jnp.int32), "decided": jnp.zeros(batch, bool)}
