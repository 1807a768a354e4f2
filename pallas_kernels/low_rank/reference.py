"""The definition, in plain jnp: every expert on every token. For tests.

Dims as in api.py.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks


def forward(
    x_TD: Array, a_ERD: Array, b_ERN: Array, gates_TX: Array, ids_TK: Array | None, onto_TN: Array | None
) -> Array:
    """out (T, N)."""
    acc = _checks.accumulator(x_TD.dtype)
    gates_TE = gates_TX.astype(acc) if ids_TK is None else gates_of_experts(gates_TX.astype(acc), ids_TK, len(a_ERD))
    h_TER = jnp.einsum("td,erd->ter", x_TD, a_ERD, preferred_element_type=acc)
    h_TER = (h_TER * gates_TE[:, :, None]).astype(x_TD.dtype)
    out_TN = jnp.einsum("ter,ern->tn", h_TER, b_ERN, preferred_element_type=acc)
    return (out_TN if onto_TN is None else out_TN + onto_TN).astype(x_TD.dtype)


def gates_of_experts(gates_TK: Array, ids_TK: Array, num_experts: int) -> Array:
    """(T, E): what each expert is given in all; ids of num_experts and more are nobody's."""
    hit_TKE = ids_TK[:, :, None] == jnp.arange(num_experts)
    return jnp.where(hit_TKE, gates_TK[:, :, None], 0).sum(1)
