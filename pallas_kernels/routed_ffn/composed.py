"""The routed network from a network on rows: XLA gathers the rows and combines them.

Dims as in api.py. `rows_forward` and `rows_backward` are those of an implementation of expert_ffn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.permute import xla as permute
from pallas_kernels.routed_ffn.operands import Operands


class Gradients(NamedTuple):
    """None for weights that are frozen or not there."""

    x_TD: Array
    w_gate_EDF: Array | None
    w_up_EDF: Array | None
    w_down_EFD: Array | None
    gates_TK: Array


def forward(
    rows_forward: Callable[..., Any], o: Operands, *, gate_on: str, **how: Any
) -> tuple[Array, Array | None, Array | None]:
    """(out, gate, up): the pre-activations of the live rows, None if not to be saved."""
    x_RD = permute.take(o.x_TD, o.token_R)
    if gate_on == "input":
        x_RD = scaled(x_RD, o.gate_R)
    y_RD, gate_RF, up_RF = rows_forward(o.of_rows(x_RD), **how)
    return permute.sum_choices(y_RD, o.slot_TK, o.gates_TK if gate_on == "output" else None), gate_RF, up_RF


def backward(
    rows_backward: Callable[..., Any],
    o: Operands,
    gate_RF: Array | None,
    up_RF: Array,
    dout_TD: Array,
    *,
    gate_on: str,
    **how: Any,
) -> Gradients:
    """From the gradient of the result and the saved pre-activations."""
    gate_R, x_RD, dout_RD = o.gate_R, permute.take(o.x_TD, o.token_R), permute.take(dout_TD, o.token_R)
    if gate_on == "output":
        dx_RD, *dweights, dgate_R = rows_backward(o.of_rows(x_RD), gate_RF, up_RF, dout_RD, gate_R, **how)
    else:
        dx_RD, *dweights, _ = rows_backward(o.of_rows(scaled(x_RD, gate_R)), gate_RF, up_RF, dout_RD, **how)
        dgate_R = jnp.sum(dx_RD.astype(gate_R.dtype) * x_RD.astype(gate_R.dtype), axis=1)
        dx_RD = scaled(dx_RD, gate_R)
    return Gradients(permute.sum_choices(dx_RD, o.slot_TK, None), *dweights, permute.take(dgate_R, o.slot_TK))


def scaled(x_RD: Array, gate_R: Array) -> Array:
    """gate * x, rounded once."""
    return (x_RD.astype(gate_R.dtype) * gate_R[:, None]).astype(x_RD.dtype)
