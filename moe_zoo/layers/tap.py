"""The seam at a linear layer's output, before its bias: where adapters act."""

from collections.abc import Callable

import jax

#: (the weight's name, x [..., in], y = x W [..., out], W [in, out]) -> what takes the place of y
Tap = Callable[[str, jax.Array, jax.Array, jax.Array], jax.Array]


def untouched(name: str, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """The layer as it is."""
    return y


def below(prefix: str, tap: Tap) -> Tap:
    """The tap of a part of that name: names gain its prefix."""
    return lambda name, *layer: tap(f"{prefix}.{name}", *layer)
