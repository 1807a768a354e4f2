"""The routed network from a network on rows: XLA gathers the rows and combines them.

Dims as in api.py. `rows_forward` and `rows_backward` are those of an implementation of expert_ffn.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.permute import xla as permute
from pallas_kernels.quantized import Weights


def forward(
    rows_forward: Callable[..., Any],
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
    gate_on: str,
    **how: Any,
) -> tuple[Array, Array | None, Array | None]:
    """(out, gate, up): the pre-activations of the live rows, None if not to be saved."""
    x_RD = permute.take(x_TD, tokens(choice_R, slot_TK))
    if gate_on == "input":
        x_RD = scaled(x_RD, row_gates(gates_TK, choice_R, x_TD.dtype))
    y_RD, gate_RF, up_RF = rows_forward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, **how)
    return permute.sum_choices(y_RD, slot_TK, gates_TK if gate_on == "output" else None), gate_RF, up_RF


def backward(
    rows_backward: Callable[..., Any],
    x_TD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    w_down_EFD: Weights,
    sizes_L: Array,
    offset: Array | None,
    choice_R: Array,
    slot_TK: Array,
    gates_TK: Array,
    gate_RF: Array | None,
    up_RF: Array,
    dout_TD: Array,
    *,
    gate_on: str,
    **how: Any,
) -> tuple[Array, Array | None, Array | None, Array | None, Array]:
    """(dx, dw_gate, dw_up, dw_down, dgates), None for weights that are frozen or not there."""
    token_R, gate_R = tokens(choice_R, slot_TK), row_gates(gates_TK, choice_R, x_TD.dtype)
    x_RD, dout_RD = permute.take(x_TD, token_R), permute.take(dout_TD, token_R)
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, gate_RF, up_RF)
    if gate_on == "output":
        dx_RD, *dweights, dgate_R = rows_backward(x_RD, *weights, dout_RD, gate_R, **how)
    else:
        dx_RD, *dweights, _ = rows_backward(scaled(x_RD, gate_R), *weights, dout_RD, **how)
        dgate_R = jnp.sum(dx_RD.astype(gate_R.dtype) * x_RD.astype(gate_R.dtype), axis=1)
        dx_RD = scaled(dx_RD, gate_R)
    return permute.sum_choices(dx_RD, slot_TK, None), *dweights, permute.take(dgate_R, slot_TK)


def tokens(choice_R: Array, slot_TK: Array) -> Array:
    """The token of each row; T: none."""
    return choice_R // max(slot_TK.shape[1], 1)


def row_gates(gates_TK: Array, choice_R: Array, dtype: Any) -> Array:
    """The gate of each row, in float32 at least; 0: none."""
    return permute.take(gates_TK.reshape(-1), choice_R).astype(_checks.accumulator(dtype))


def scaled(x_RD: Array, gate_R: Array) -> Array:
    """gate * x, rounded once."""
    return (x_RD.astype(gate_R.dtype) * gate_R[:, None]).astype(x_RD.dtype)
