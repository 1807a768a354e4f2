"""The routed network from a network on rows: XLA gathers the rows and combines them.

Dims as in api.py. `rows_forward` and `rows_backward` are those of an implementation of expert_ffn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.permute import xla as permute
from pallas_kernels.quantized import Weights


class Operands(NamedTuple):
    """All that the op takes, as in api.py: tokens, weights, groups, the plan of rows and its gates."""

    x_TD: Array
    w_gate_EDF: Weights | None
    w_up_EDF: Weights
    w_down_EFD: Weights
    sizes_L: Array
    offset: Array | None
    choice_R: Array
    slot_TK: Array
    gates_TK: Array

    @property
    def network(self) -> tuple[Any, ...]:
        """Weights and groups: what expert_ffn takes besides rows."""
        return self[1:6]

    @property
    def token_R(self) -> Array:
        """The token of each row; T: none."""
        return self.choice_R // max(self.slot_TK.shape[1], 1)

    @property
    def gate_R(self) -> Array:
        """The gate of each row, in float32 at least; 0: none."""
        gate_R = permute.take(self.gates_TK.reshape(-1), self.choice_R)
        return gate_R.astype(_checks.accumulator(self.x_TD.dtype))


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
    y_RD, gate_RF, up_RF = rows_forward(x_RD, *o.network, **how)
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
    saved = (*o.network, gate_RF, up_RF)
    if gate_on == "output":
        dx_RD, *dweights, dgate_R = rows_backward(x_RD, *saved, dout_RD, gate_R, **how)
    else:
        dx_RD, *dweights, _ = rows_backward(scaled(x_RD, gate_R), *saved, dout_RD, **how)
        dgate_R = jnp.sum(dx_RD.astype(gate_R.dtype) * x_RD.astype(gate_R.dtype), axis=1)
        dx_RD = scaled(dx_RD, gate_R)
    return Gradients(permute.sum_choices(dx_RD, o.slot_TK, None), *dweights, permute.take(dgate_R, o.slot_TK))


def scaled(x_RD: Array, gate_R: Array) -> Array:
    """gate * x, rounded once."""
    return (x_RD.astype(gate_R.dtype) * gate_R[:, None]).astype(x_RD.dtype)
