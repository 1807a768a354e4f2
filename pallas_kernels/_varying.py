"""What `jax.shard_map(check_vma=True)` asks of code with loops and custom derivatives.

Inside shard_map each value has a set of mesh axes over which it varies. A while loop's carry must enter with the set it
leaves with, and a custom derivative must return cotangents with the sets of its inputs. Both hold if every operand is
first made to vary over the union of the sets: the derivative of that cast is the psum that replicated weights need.
"""

from typing import Any

import jax
import jax.numpy as jnp


def _axes(x: Any) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _cast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def same_varying(*operands: Any) -> tuple[Any, ...]:
    """Casts all arrays (leaves of `operands`, which may be None) to vary over the union of their mesh axes."""
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(operands)))
    return jax.tree.map(lambda x: _cast(x, axes), operands)


def zeros_like_varying(shape: tuple[int, ...], dtype: Any, like: jax.Array, *, negative: bool = False) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`: fit for the carry of a loop which mixes `like` in.

    Two equal constants of one shape become one buffer, of which XLA then copies one per loop carry. `negative` gives
    -0.0: another constant, so that a pair of arrays needs no copy.
    """
    return _cast(jnp.full(shape, -0.0 if negative else 0.0, dtype), _axes(like))
