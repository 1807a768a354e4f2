"""Sequences cut into chunks: within one everything at once, from chunk to chunk a state (arXiv 2312.06635, section 4).

B batch, S sequence, H heads, n chunks, C tokens of a chunk, N state size.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How far the tokens of each chunk see, and by how much what they see has decayed.

    `logs` are the sums of log decays from the chunk's start to each token, its own included, per head ([B n C H]) or
    also per component of the state ([B n C H N]).
    """

    length: int
    logs: Float[Array, "B n C H *N"]
    documents: Int[Array, "B n C"] | None

    def start(self) -> Float[Array, "B n C H *N"]:
        """The decay of the state before the chunk at each token; 0 for tokens of a later document."""
        return self._masked(jnp.exp(self.logs), lambda doc: doc == self._before())

    def end(self) -> Float[Array, "B n C H *N"]:
        """The decay of each token at the end of the chunk; 0 for those of an earlier document than the last."""
        return self._masked(jnp.exp(self.logs[:, :, -1:] - self.logs), lambda doc: doc == doc[:, :, -1:])

    def whole(self) -> Float[Array, "B n H *N"]:
        """The decay of the state from before the chunk to its end."""
        decay = jnp.exp(self.logs[:, :, -1:])
        return self._masked(decay, lambda doc: doc[:, :, -1:] == self._before())[:, :, 0]

    def sees(self, itself: bool = True) -> Bool[Array, "B n C C"]:
        """Which tokens (last axis) a token of the same chunk sees."""
        C = self.logs.shape[2]
        mask = jnp.tril(jnp.ones((C, C), bool), 0 if itself else -1)[None, None]
        if self.documents is None:
            return mask
        return mask & (self.documents[..., :, None] == self.documents[..., None, :])

    def pairs(self) -> Float[Array, "B n C C H *N"]:
        """The decay from one token (second of the axes C) to a later one (first)."""
        between = self.logs[:, :, :, None] - self.logs[:, :, None]
        mask = self.sees().reshape(*self.sees().shape, *(1,) * (between.ndim - 4))
        return jnp.exp(jnp.where(mask, between, -jnp.inf))

    def join(self, y_BnCH) -> Array:
        """[B n C ...] -> [B S ...], without what was added to fill the last chunk."""
        B, n, C, *rest = y_BnCH.shape
        return y_BnCH.reshape(B, n * C, *rest)[:, : self.length]

    def _before(self):
        """The document of the token before the chunk: the state's."""
        last = self.documents[:, :, -1]
        return jnp.concatenate([self.documents[:, 0, :1] * 0, last[:, :-1]], axis=1)[..., None]

    def _masked(self, decay, same):
        if self.documents is None:
            return decay
        mask = same(self.documents)
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (decay.ndim - 3)), decay, 0)


def cut(log_decay, documents, size: int, *arrays) -> tuple[Chunks, list[Array]]:
    """(the chunks, `arrays` [B S ...] as float32 (or wider) [B n C ...]), the last chunk filled with zeros, which
    decay nothing and add nothing.
    """
    S = log_decay.shape[1]
    C = min(size, S)
    n = -(-S // C)

    def split(x, mode="constant"):
        x = jnp.pad(x, [(0, 0), (0, n * C - S)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(x.shape[0], n, C, *x.shape[2:])

    wide = lambda x: split(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    documents = None if documents is None else split(documents, "edge")
    return Chunks(S, jnp.cumsum(wide(log_decay), axis=2), documents), [wide(x) for x in arrays]
