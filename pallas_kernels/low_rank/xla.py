"""The low-rank product by XLA, in two forms that are the same function.

dense    all experts' ranks side by side, the gates between two products: ((x A^T) * G) B
grouped  choices sorted by expert, two grouped products on their rows, and each token's rows added up

Dims as in api.py; L = E R ranks of all experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _checks, _tiles, _tpu_target
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.low_rank.reference import gates_of_experts
from pallas_kernels.permute import combine_rows, gather_rows
from pallas_kernels.route_top_k import expert_rows


@jax.custom_vjp
def to_ranks(x_TD: Float[Array, "T D"], a_LD: Float[Array, "L D"]) -> Float[Array, "T L"]:
    """x A^T, in x's dtype. Reverse mode only."""
    return _dot(x_TD, a_LD, 1, 1)


@jax.custom_vjp
def from_ranks(h_TL: Float[Array, "T L"], b_LN: Float[Array, "L N"]) -> Float[Array, "T N"]:
    """h B, in h's dtype. Reverse mode only."""
    return _dot(h_TL, b_LN, 1, 0)


def _dot(left: Array, right: Array, i: int, j: int) -> Array:
    wide = jax.lax.dot_general(
        left, right, (((i,), (j,)), ((), ())), preferred_element_type=_checks.accumulator(left.dtype)
    )
    return wide.astype(left.dtype)


# A gradient of weights contracts tokens, the first dim of both sides, which XLA's CPU compiler does outside its fast
# library (_tiles.transposed). Here one side is narrow, and its transpose costs next to nothing.
def _to_ranks_backward(saved, dh_TL):
    x_TD, a_LD = saved
    return _dot(dh_TL, a_LD, 1, 0), _dot(_tiles.transposed(dh_TL), x_TD, 1, 0)


def _from_ranks_backward(saved, dy_TN):
    h_TL, b_LN = saved
    return _dot(dy_TN, b_LN, 1, 1), _dot(_tiles.transposed(h_TL), dy_TN, 1, 0)


to_ranks.defvjp(lambda x_TD, a_LD: (to_ranks(x_TD, a_LD), (x_TD, a_LD)), _to_ranks_backward)
from_ranks.defvjp(lambda h_TL, b_LN: (from_ranks(h_TL, b_LN), (h_TL, b_LN)), _from_ranks_backward)


def dense(
    x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TX: Array, ids_TK: Array | None, onto_TN: Array | None
) -> Array:
    """out (T, N), every expert's ranks for every token."""
    E, R, D = a_ERD.shape
    gates_TE = gates_TX if ids_TK is None else gates_of_experts(gates_TX, ids_TK, E)
    h_TL = to_ranks(x_TD, a_ERD.reshape(E * R, D))
    h_TER = h_TL.reshape(-1, E, R) * gates_TE[:, :, None].astype(h_TL.dtype)
    out_TN = from_ranks(h_TER.reshape(-1, E * R), b_ERN.reshape(E * R, -1))
    return out_TN if onto_TN is None else onto_TN + out_TN


def grouped(x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TK: Array, ids_TK: Array, onto_TN: Array | None) -> Array:
    """out (T, N), a token's own experts alone."""
    (T, K), E = ids_TK.shape, len(a_ERD)
    sizes_E, slot_TK = expert_rows(ids_TK, E)

    def products(x_RD, gate_R1):
        # the gates meet the ranks, not the wide output
        h_RR = grouped_matmul(x_RD, a_ERD, sizes_E, transpose_rhs=True)
        return grouped_matmul(h_RR * gate_R1.astype(h_RR.dtype), b_ERN, sizes_E)

    return on_rows(products, x_TD, gates_TK, slot_TK, T * K, onto_TN)


def on_rows(
    products: Callable[[Array, Array], Array],
    x_TD: Array,
    gates_TK: Array,
    slot_TK: Array,
    num_rows: int,
    onto_TN: Array | None,
) -> Array:
    """Tokens and gates to their rows, what `products` makes of them, and each token's rows added up. `slot_TK`: the row
    of each choice; `num_rows` and more: none.
    """
    choice_R, slot_N = choices(slot_TK, num_rows), slot_TK.reshape(-1)
    x_RD = gather_rows(x_TD, choice_R // slot_TK.shape[1], slot_TK)
    gate_R1 = gather_rows(gates_TK.reshape(-1, 1), choice_R, slot_N[:, None])
    ones_TK = jnp.ones(slot_TK.shape, jnp.float32)
    out_TN = combine_rows(products(x_RD, gate_R1), slot_TK, ones_TK, choice_R)
    return out_TN if onto_TN is None else onto_TN + out_TN


def choices(slot_TK: Array, num_rows: int) -> Array:
    """The choice t * K + k of each row, T * K: none. `slot_TK`: the row of each choice; `num_rows` and more: none."""
    N, slot_N = slot_TK.size, slot_TK.reshape(-1)
    choice_N = jnp.arange(N, dtype=jnp.int32)
    # choices of no row, each to a place of its own beyond the end: all indices are then unique
    target_N = jnp.where(slot_N < num_rows, slot_N, num_rows + choice_N)
    return jnp.full(num_rows, N, jnp.int32).at[target_N].set(choice_N, mode="drop", unique_indices=True)


def grouped_pays(num_experts: int, rank: int, k: int) -> bool:
    """Whether K sorted choices of a token are cheaper than all experts, forward and backward."""
    target = _tpu_target.current()
    if target is not _tpu_target.UNKNOWN:
        # Moving rows costs about three passes over K (D + N) numbers of two bytes, which take as long as the dense
        # products of this many ranks: a matter of the chip's FLOPs per byte. Not timed.
        return num_experts * rank > 3 * k * 2 * target.macs_per_cycle / target.bytes_per_cycle
    # Not timed on a GPU; where grouped_matmul has no kernel there, every row is multiplied by every group's matrix.
    # A row in and out takes as long as about 95 dense ranks, and a rank of a sorted row as long as 1.5. Fitted to CPU
    # seconds of two busy cores (T 2048, D = N = 1024, K 1 to 4, R 4 to 32; docs/performance.md).
    return jax.default_backend() == "cpu" and num_experts * rank > k * (95 + 1.5 * rank)
