"""Where each group's rows begin and end. Shared by all ops on rows that are sorted by group.

Dims: R (or M) rows, G groups held by the weights, L >= G groups in the sizes vector.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def group_bounds(
    sizes_L: Int[Array, " L"], offset: Int[Array, ""] | None, num_groups: int, num_rows: int
) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """First row and end row (int32) of groups offset .. offset + num_groups."""
    ends_L = jnp.minimum(jnp.cumsum(sizes_L.astype(jnp.int32), dtype=jnp.int32), num_rows)
    starts_L = jnp.concatenate([jnp.zeros_like(ends_L[:1]), ends_L[:-1]])
    if offset is None:
        return starts_L, ends_L
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, offset, num_groups)
    return take(starts_L), take(ends_L)


def live_rows(starts_G: Int[Array, " G"], ends_G: Int[Array, " G"], num_rows: int) -> Bool[Array, "R 1"]:
    """True for rows of the groups at hand. Groups are consecutive, so their rows are one range."""
    row_R1 = jax.lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    return (row_R1 >= starts_G[0]) & (row_R1 < ends_G[-1])


def membership(starts_G: Int[Array, " G"], ends_G: Int[Array, " G"], num_rows: int) -> Bool[Array, "G R"]:
    """True where row r belongs to group g. Dense: for references only."""
    row_1R = jnp.arange(num_rows, dtype=jnp.int32)[None, :]
    return (row_1R >= starts_G[:, None]) & (row_1R < ends_G[:, None])


def take_groups(scale_GX: Float[Array, "G X"], ends_G: Int[Array, " G"], num_rows: int) -> Float[Array, "R X"]:
    """Each row's line of `scale`, its group's; the last group's for rows beyond all."""
    row_R = jnp.arange(num_rows, dtype=ends_G.dtype)
    group_R = jnp.sum(row_R[:, None] >= ends_G, axis=1)
    return jnp.take(scale_GX, group_R, axis=0, mode="clip")
