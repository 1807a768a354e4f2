"""Attention within clusters of tokens, and clusters that follow the tokens: the arithmetic of `routed_attention`.

B batch, N heads, S sequence, K clusters, W members of a cluster, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

#: group of what nobody is to see
NOBODY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values of some heads, positions already turned in."""

    q: Float[Array, "B N S H"]
    k: Float[Array, "B N S H"]
    v: Float[Array, "B N S H"]

    def heads(self, part: slice) -> "Heads":
        """Some of the heads."""
        return Heads(*(x[:, part] for x in (self.q, self.k, self.v)))


def attend_where(
    q: Float[Array, "*Z Q H"],
    k: Float[Array, "*Z L H"],
    v: Float[Array, "*Z L H"],
    mask: Bool[Array, "*Z Q L"],
    scale: float,
) -> Float[Array, "*Z Q H"]:
    """softmax(q k * scale) v over the keys of the mask, in float32; 0 for a query that sees none."""
    scores = jnp.matmul(q * scale, jnp.swapaxes(k, -1, -2))
    scores = jnp.where(mask, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    exp = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0))
    total = jnp.sum(exp, -1, keepdims=True)
    out = jnp.matmul(exp.astype(v.dtype), v) / jnp.where(total == 0, 1, total)
    return out.astype(v.dtype)


def without_itself(mask: Bool[Array, "*Z Q L"], itself: Bool[Array, "*Z Q L"]) -> Bool[Array, "*Z Q L"]:
    """The mask without a query's own key, but where it would see nothing else."""
    others = mask & ~itself
    return others | (mask & ~others.any(-1, keepdims=True))


def banded(
    x: Heads, group_BNS: Int[Array, "B N S"], window: int, scale: float, itself: bool = True, past: int = 0
) -> Float[Array, "B N S-past H"]:
    """Each token looks at itself and at those of its group among the `window` - 1 before it; not at `itself`, if that
    is False and there are others. Of the first `past` < `window` tokens keys and values alone are looked at.
    """
    B, N, S, H = x.q.shape
    Q = S - past
    c = min(window, Q)
    ahead, behind = window - 1 - past, -Q % c
    pad = lambda a, front: jnp.pad(a, ((0, 0), (0, 0), (front, behind), (0, 0)))
    q = pad(x.q[:, :, past:], 0).reshape(B, N, -1, c, H)
    own = jnp.pad(group_BNS[..., past:], ((0, 0), (0, 0), (0, behind))).reshape(B, N, -1, c)
    at = jnp.arange(q.shape[2])[:, None] * c + jnp.arange(c + window - 1)
    k, v = (pad(a, ahead)[:, :, at] for a in (x.k, x.v))
    group = jnp.pad(group_BNS, ((0, 0), (0, 0), (ahead, behind)), constant_values=NOBODY)[..., at]
    distance = jnp.arange(c)[:, None] + window - 1 - jnp.arange(c + window - 1)
    mask = (distance >= 0) & (distance < window) & (own[..., None] == group[..., None, :])
    if not itself:
        mask = without_itself(mask, jnp.broadcast_to(distance == 0, mask.shape))
    out = attend_where(q, k, v, mask, scale)
    return out.reshape(B, N, -1, H)[:, :, :Q]


def within_own(
    x: Heads, cluster_BNS: Int[Array, "B N S"], group_BNS: Int[Array, "B N S"], window: int, scale: float, itself: bool
) -> Float[Array, "B N S H"]:
    """Each token looks at the last `window` tokens of its cluster and group, itself included: sorted by cluster, in
    order, these lie side by side.
    """
    order = jnp.argsort(cluster_BNS, axis=-1, stable=True)
    some = lambda a: jnp.take_along_axis(a, order, axis=-1)
    in_order = jax.tree.map(lambda a: jnp.take_along_axis(a, order[..., None], axis=2), x)
    both = some(cluster_BNS) * (1 + group_BNS.max()) + some(group_BNS)
    out = banded(in_order, both, window, scale, itself)
    return jnp.take_along_axis(out, jnp.argsort(order, axis=-1)[..., None], axis=2)


def best(a_BNSK: Float[Array, "B N S K"], live_BS: Bool[Array, "B S"], W: int) -> Int[Array, "B N K W"]:
    """Places of each cluster's W highest scores, in order; padding comes after all that is real."""
    a_BNKS = jnp.where(live_BS[:, None, None], jnp.swapaxes(a_BNSK, 2, 3), -jnp.inf)
    return jnp.sort(jax.lax.top_k(a_BNKS, min(W, a_BNKS.shape[-1]))[1], axis=-1)


def within_chosen(
    x: Heads,
    queries_BNKW: Int[Array, "B N K W"],
    keys_BNKW: Int[Array, "B N K W"],
    live_BS: Bool[Array, "B S"],
    group_BS: Int[Array, "B S"],
    scale: float,
    itself: bool,
) -> tuple[Float[Array, "B N S H"], Int[Array, "B N S"]]:
    """Attention among the tokens that the clusters chose: (outputs summed over a token's clusters, how many it is in).
    Causal in what is looked at. Not in who is chosen.
    """
    B, N, K, W = queries_BNKW.shape
    pick = lambda a, at: jnp.take_along_axis(a, at.reshape(B, N, -1)[..., None], axis=2).reshape(B, N, K, W, -1)
    of = lambda a_BS, at: jnp.take_along_axis(a_BS[:, None], at.reshape(B, N, -1), axis=2).reshape(B, N, K, W)
    queries, keys = queries_BNKW[..., :, None], keys_BNKW[..., None, :]
    mask = (queries >= keys) & of(live_BS, keys_BNKW)[..., None, :]
    mask &= of(group_BS, queries_BNKW)[..., :, None] == of(group_BS, keys_BNKW)[..., None, :]
    if not itself:
        mask = without_itself(mask, queries == keys)
    out = attend_where(pick(x.q, queries_BNKW), pick(x.k, keys_BNKW), pick(x.v, keys_BNKW), mask, scale)
    rows = (jnp.arange(B)[:, None, None], jnp.arange(N)[:, None], queries_BNKW.reshape(B, N, -1))
    total = jnp.zeros_like(x.v).at[rows].add(out.reshape(B, N, K * W, -1))
    count = jnp.zeros(x.v.shape[:3], jnp.int32).at[rows].add(1)
    return total, count


# ------------------------------------------------------------------------------------------------------ token by token


def empty(batch: int, N: int, K: int, W: int, H: int, dtype) -> dict[str, Array]:
    """Clusters without members: what a token by itself looks at. `at`: the members' positions; `scores`: by what they
    are members; `queries`: the same of queries, which have members of their own.
    """
    slots = (batch, N, K, W)
    return {
        "k": jnp.zeros((*slots, H), dtype),
        "v": jnp.zeros((*slots, H), dtype),
        "at": jnp.full(slots, -1, jnp.int32),
        "scores": jnp.full(slots, -jnp.inf, jnp.float32),
        "queries": jnp.full(slots, -jnp.inf, jnp.float32),
    }


def one_by_one(
    x: Heads,
    queries_BNSK: Float[Array, "B N S K"],
    keys_BNSK: Float[Array, "B N S K"],
    members: dict[str, Array],
    live_BS: Bool[Array, "B S"],
    group_BS: Int[Array, "B S"],
    position_BS: Int[Array, "B S"],
    scale: float,
    itself: bool,
) -> tuple[Float[Array, "B N S H"], Int[Array, "B N S"], dict[str, Array]]:
    """As `within_chosen`, but each token when its turn comes, among those before it: a cluster's members are always the
    W best so far, of equal ones the earlier; a score of -inf is no member's. Also returns the members that remain.

    `members` are of group 0.
    """
    begins_BS = (jnp.diff(group_BS, axis=1, prepend=0) != 0) & live_BS
    by_token = lambda a: jnp.moveaxis(a, 2, 0)
    tokens = (jax.tree.map(by_token, x), by_token(queries_BNSK), by_token(keys_BNSK))

    def step(members, xs):
        (x, queries_BNK, keys_BNK), live_B, begins_B, position_B = xs
        again = begins_B[:, None, None, None]
        members = members | {n: jnp.where(again, -jnp.inf, members[n]) for n in ("scores", "queries")}
        members, enters_BNK = _enter(members, x, queries_BNK, keys_BNK, live_B, position_B)
        mask = members["scores"] > -jnp.inf
        if not itself:
            own = members["at"] == position_B[:, None, None, None]
            mask = without_itself(mask[..., None, :], own[..., None, :])[..., 0, :]
        q = jnp.broadcast_to(x.q[:, :, None, None], (*mask.shape[:3], 1, x.q.shape[-1]))
        out = attend_where(q, members["k"].astype(q.dtype), members["v"].astype(q.dtype), mask[..., None, :], scale)
        total = jnp.sum(jnp.where(enters_BNK[..., None], out[..., 0, :], 0), 2)
        return members, (total, enters_BNK.sum(-1, dtype=jnp.int32))

    xs = (tokens, live_BS.T, begins_BS.T, position_BS.T)
    members, (total, count) = jax.lax.scan(step, members, xs)
    return jnp.moveaxis(total, 0, 2), jnp.moveaxis(count, 0, 2), members


def _enter(members, x: Heads, queries_BNK, keys_BNK, live_B, position_B):
    """(members with a new token, the clusters that it enters as a query)."""
    live = live_B[:, None, None]
    lowest_BNK = members["scores"].min(-1)
    enters = (keys_BNK > lowest_BNK) & live
    # of the worst the last one gives its place
    slot = jnp.argmax(jnp.where(members["scores"] == lowest_BNK[..., None], members["at"], -2), -1)
    asks = (queries_BNK > members["queries"].min(-1)) & live
    by_cluster = {"k": x.k[:, :, None], "v": x.v[:, :, None], "at": position_B[:, None, None], "scores": keys_BNK}
    new = {name: _put(members[name], slot, enters, value) for name, value in by_cluster.items()}
    return new | {"queries": _put(members["queries"], members["queries"].argmin(-1), asks, queries_BNK)}, asks


def _put(old_BNKW, slot_BNK, where_BNK, new_BNK):
    """`new` in the place of each cluster's member `slot`."""
    B, N, K = slot_BNK.shape
    at = (jnp.arange(B)[:, None, None], jnp.arange(N)[:, None], jnp.arange(K), slot_BNK)
    where = where_BNK.reshape(B, N, K, *[1] * (old_BNKW.ndim - 4))
    return old_BNKW.at[at].set(jnp.where(where, new_BNK.astype(old_BNKW.dtype), old_BNKW[at]), unique_indices=True)


# ------------------------------------------------------------------------------------------------------------- k-means


def assigned(
    vectors_BNSH: Float[Array, "B N S H"], nearest_BNS: Int[Array, "B N S"], live_BS: Bool[Array, "B S"], K: int
) -> tuple[Float[Array, "N K"], Float[Array, "N K H"]]:
    """(how many tokens each cluster has, the sum of their vectors)."""
    hot = (nearest_BNS[..., None] == jnp.arange(K)) & live_BS[:, None, :, None]
    hot = hot.astype(vectors_BNSH.dtype)
    return hot.sum((0, 2)), jnp.einsum("bnsk,bnsh->nkh", hot, vectors_BNSH)


def averaged(
    means_NKH: Float[Array, "N K H"],
    counts_NK: Float[Array, "N K"],
    new_NK: Float[Array, "N K"],
    sums_NKH: Float[Array, "N K H"],
    decay: float,
    eps: float,
) -> tuple[Float[Array, "N K H"], Float[Array, "N K"]]:
    """Moving averages of counts and sums, and their ratio, the means: one iteration of Lloyd's with decay = eps = 0.
    A cluster that never had a token keeps its mean.
    """

    def smooth(n):
        total = n.sum(-1, keepdims=True)
        return (n + eps) / jnp.where(total == 0, 1, total + n.shape[-1] * eps) * total

    sums = decay * means_NKH * smooth(counts_NK)[..., None] + (1 - decay) * sums_NKH
    counts = decay * counts_NK + (1 - decay) * new_NK
    weight = smooth(counts)[..., None]
    there = counts[..., None] > 0
    return jnp.where(there, sums / jnp.where(there, weight, 1), means_NKH), counts


def averaged_directions(
    means_NKH: Float[Array, "N K H"], new_NK: Float[Array, "N K"], sums_NKH: Float[Array, "N K H"], decay: float
) -> Float[Array, "N K H"]:
    """Moving averages of the clusters' directions; one without a token keeps its mean."""
    return jnp.where(new_NK[..., None] > 0, decay * means_NKH + (1 - decay) * unit(sums_NKH), means_NKH)


def unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """x / |x|, and 0 where x is."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def normal_layer(x: Float[Array, "... H"], eps: float) -> Float[Array, "... H"]:
    """Layer norm without weights."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
