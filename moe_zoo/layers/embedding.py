"""Token embedding, and the output head that may share its table."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.core.param import Constant, Normal, fan_in, param


class Embedding(nnx.Module):
    """table[ids], times a learned scalar that begins at `scale` if that is not 0 (DyT); `attend` gives logits with the
    same table (tied embeddings), as it is.
    """

    def __init__(self, vocab_size: int, hidden_size: int, std: float = 0.02, scale: float = 0.0):
        self.table = param((vocab_size, hidden_size), ("vocab", "embed"), Normal(std))
        if scale:
            self.scale = param((), (), Constant(scale))

    def __call__(self, ids_BS: Int[Array, "B S"], dtype) -> Float[Array, "B S D"]:
        found = jnp.take(self.table[...].astype(dtype), ids_BS, axis=0)
        return found * self.scale[...].astype(dtype) if hasattr(self, "scale") else found

    def attend(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        return x_BSD @ self.table[...].astype(x_BSD.dtype).T


class Head(nnx.Module):
    """The untied output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, bias: bool = False):
        # small: the first predictions are near uniform, and the loss starts at log V
        self.kernel = param((hidden_size, vocab_size), ("embed", "vocab"), fan_in(hidden_size, 0.1))
        if bias:
            self.bias = param((vocab_size,), ("vocab",), Constant(0.0))

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        logits = x_BSD @ self.kernel[...].astype(x_BSD.dtype)
        return logits + self.bias[...].astype(logits.dtype) if hasattr(self, "bias") else logits
