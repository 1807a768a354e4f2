"""The definition, in plain jnp: gather, every expert on every row, scatter. For tests.

Dims as in api.py.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.expert_ffn import reference
from pallas_kernels.routed_ffn.operands import Operands


def forward(o: Operands, *, activation: str, gate_on: str) -> Array:
    """out (T, D)."""
    (T, D), K, acc = o.x_TD.shape, o.slot_TK.shape[1], _checks.accumulator(o.x_TD.dtype)
    token_R = o.choice_R // max(K, 1)
    one_more = lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])
    x_RD = one_more(o.x_TD)[token_R]
    gate_R1 = one_more(o.gates_TK.reshape(T * K))[o.choice_R][:, None].astype(acc)
    if gate_on == "input":
        x_RD = (x_RD * gate_R1).astype(o.x_TD.dtype)
    y_RD = reference.forward(o.of_rows(x_RD), activation=activation)
    y_RD = y_RD.astype(acc) * (gate_R1 if gate_on == "output" else 1)
    return jnp.zeros((T, D), acc).at[token_R].add(y_RD, mode="drop").astype(o.x_TD.dtype)
