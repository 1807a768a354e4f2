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


def varying_like(arrays: Any, like: jax.Array) -> Any:
    """Casts all arrays to vary over the mesh axes of `like`."""
    return jax.tree.map(lambda x: _cast(x, _axes(like)), arrays)


def zeros_like_varying(
    shape: tuple[int, ...], dtype: Any, like: jax.Array, *, own: tuple[jax.Array, int] | None = None
) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`: fit for the carry of a loop which mixes `like` in.

    XLA makes one buffer of all equal constants of one shape, and copies it for each loop that writes into it. `own`: a
    count (which is never negative, and XLA does not know that) and a number that no other array of this count has.
    """
    zero = jnp.zeros((), dtype) if own is None else (own[0] < -own[1]).astype(dtype)
    return _cast(jnp.broadcast_to(zero, shape), _axes(like))
