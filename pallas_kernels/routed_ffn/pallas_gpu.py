"""The routed network as Pallas GPU kernels: rows are gathered on the way into the kernels that need them.

The gathered rows are never written, forward or backward. What the way down and dx give are rows; XLA adds up each
token's in one fused gather. Gates on the output weigh that sum; backward, the epilogue that makes the gradients of the
pre-activations multiplies each row by its gate, and sums up the gate's own gradient. With gates on the input the rows
are gathered by XLA. Dims as in api.py.
"""

import functools
from typing import Any

from jaxtyping import Array

from pallas_kernels.expert_ffn import pallas_gpu as ffn
from pallas_kernels.permute import xla as permute
from pallas_kernels.quantized import Weights
from pallas_kernels.routed_ffn import composed


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
    gate_on: str,
    activation: str,
    save: bool,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """(out, gate, up): the pre-activations of the live rows, None if not to be saved."""
    if gate_on == "input":
        rows_forward = functools.partial(ffn.forward, activation=activation, save=save, interpret=interpret)
        operands = (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK)
        return composed.forward(rows_forward, *operands, gate_on=gate_on)
    groups, token_R = ffn.Groups(sizes_L, offset, interpret), composed.tokens(choice_R, slot_TK)
    hidden_RF, gate_RF, up_RF = ffn.up(x_TD, token_R, w_gate_EDF, w_up_EDF, groups, activation=activation, save=save)
    return permute.sum_choices(ffn.down(hidden_RF, w_down_EFD, groups), slot_TK, gates_TK), gate_RF, up_RF


def backward(
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
    activation: str,
    interpret: bool = False,
) -> tuple[Any, ...]:
    """(dx, dw_gate, dw_up, dw_down, dgates), None for weights that are frozen or not there."""
    how = dict(activation=activation, interpret=interpret)
    if gate_on == "input":
        plan = (sizes_L, offset, choice_R, slot_TK, gates_TK, gate_RF, up_RF, dout_TD)
        rows_backward = functools.partial(ffn.backward, **how)
        return composed.backward(rows_backward, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, *plan, gate_on=gate_on)
    gate_R = composed.row_gates(gates_TK, choice_R, x_TD.dtype)
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, gate_RF, up_RF)
    token_R = composed.tokens(choice_R, slot_TK)
    dx_RD, *dweights, dgate_R = ffn.backward(x_TD, *weights, dout_TD, gate_R, token_R=token_R, **how)
    return permute.sum_choices(dx_RD, slot_TK, None), *dweights, permute.take(dgate_R, slot_TK)
