"""The definition, in plain jnp: gather, every expert on every row, scatter. For tests.

Dims as in api.py.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.expert_ffn import reference
from pallas_kernels.quantized import Weights


def forward(
    x_TD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    w_down_EFD: Weights,
    sizes_L: Array,
    offset: Array | None,
    choice_R: Array,
    slot_TK: Array,
    gates_TK: Array,
    *,
    activation: str,
    gate_on: str,
) -> Array:
    """out (T, D)."""
    (T, D), K, acc = x_TD.shape, slot_TK.shape[1], _checks.accumulator(x_TD.dtype)
    one_more = lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])
    x_RD = one_more(x_TD)[choice_R // max(K, 1)]
    gate_R1 = one_more(gates_TK.reshape(T * K))[choice_R][:, None].astype(acc)
    if gate_on == "input":
        x_RD = (x_RD * gate_R1).astype(x_TD.dtype)
    y_RD = reference.forward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, activation=activation)
    y_RD = y_RD.astype(acc) * (gate_R1 if gate_on == "output" else 1)
    return jnp.zeros((T, D), acc).at[choice_R // max(K, 1)].add(y_RD, mode="drop").astype(x_TD.dtype)
