"""Which tokens a token may look at: the rule of attention, and of routers that mix tokens.

B batch, S queries, L keys.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Query rows per block: without a cache blocks see only the keys up to their end, which saves half the work.
_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """S queries over L keys: those at or before them, of their own segment, that are valid.

    `first` None: the keys are the queries' own tokens. Otherwise keys are the L places of a cache, the queries' own
    tokens those from `first` on; places not written yet are not valid. `chunk` c: only tokens whose position is in the
    same run of c.
    """

    positions: Int[Array, "B S"]
    key_positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B S"] | None = None
    key_valid: Bool[Array, "B L"] | None = None
    first: Int[Array, ""] | None = None
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(queries, the keys that these may see) until all queries had their turn."""
        S, L = self.positions.shape[1], self.key_positions.shape[1]
        for start in range(0, S, _BLOCK):
            end = min(start + _BLOCK, S)
            yield slice(start, end), slice(0, end if self.first is None else L)

    def mask(self, queries: slice, keys: slice, window: int | None = None) -> Bool[Array, "B s l"]:
        """Who is seen. `window` w: only a token itself and those of the w - 1 positions before it."""
        distance = self.positions[:, queries, None] - self.key_positions[:, None, keys]
        mask = distance >= 0
        if self.first is None:  # positions restart with each packed document: order within the row must hold as well
            mask &= jnp.arange(self.positions.shape[1])[queries, None] >= jnp.arange(self.key_positions.shape[1])[keys]
        if window is not None:
            mask &= distance < window
        if self.chunk is not None:
            run = lambda positions: positions // self.chunk
            mask &= run(self.positions[:, queries, None]) == run(self.key_positions[:, None, keys])
        if self.segment_ids is not None:
            mask &= self.segment_ids[:, queries, None] == self.segment_ids[:, None, keys]
        if self.key_valid is not None:
            mask &= self.key_valid[:, None, keys]
        return mask

    def itself(self, queries: slice, keys: slice) -> Bool[Array, "s l"]:
        """Which key is the query's own token."""
        rows = jnp.arange(self.positions.shape[1])[queries] + (0 if self.first is None else self.first)
        return rows[:, None] == jnp.arange(self.key_positions.shape[1])[keys]
