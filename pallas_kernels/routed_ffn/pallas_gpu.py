"""The routed network as Pallas GPU kernels: rows are gathered on the way into the kernels that need them.

The gathered rows are never written, forward or backward. What the way down and dx give are rows; XLA adds up each
token's in one fused gather. Gates on the output weigh that sum; backward, the epilogue that makes the gradients of the
pre-activations multiplies each row by its gate, and sums up the gate's own gradient. With gates on the input the rows
are gathered by XLA. Dims as in api.py.
"""

import functools
from typing import Any

from jaxtyping import Array

from pallas_kernels.expert_ffn import in_kernels
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
        rows_forward = functools.partial(in_kernels.forward, ffn, activation=activation, save=save, interpret=interpret)
        operands = (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK)
        return composed.forward(rows_forward, *operands, gate_on=gate_on)
    groups = in_kernels.Groups(sizes_L, offset, interpret)
    how = dict(activation=activation, save=save, token_R=composed.tokens(choice_R, slot_TK))
    hidden_RF, gate_RF, up_RF = ffn.up(x_TD, w_gate_EDF, w_up_EDF, groups, **how)
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
    if gate_on == "input":
        rows_backward = functools.partial(in_kernels.backward, ffn, activation=activation, interpret=interpret)
        plan = (sizes_L, offset, choice_R, slot_TK, gates_TK, gate_RF, up_RF, dout_TD)
        return composed.backward(rows_backward, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, *plan, gate_on=gate_on)
    groups = in_kernels.Groups(sizes_L, offset, interpret)
    token_R, gate_R = composed.tokens(choice_R, slot_TK), composed.row_gates(gates_TK, choice_R, x_TD.dtype)
    how = dict(activation=activation, token_R=token_R, scale_R=gate_R)
    d = ffn.dhidden(dout_TD, w_down_EFD, gate_RF, up_RF, groups, **how)
    dx_TD = permute.sum_choices(ffn.dx(d, w_gate_EDF, w_up_EDF, groups), slot_TK, None)
    gradient = functools.partial(in_kernels.weight_gradient, ffn, groups)
    dw_gate_EDF = gradient(w_gate_EDF, x_TD, d.dgate_RF, left_token_R=token_R)
    dw_up_EDF = gradient(w_up_EDF, x_TD, d.dup_RF, left_token_R=token_R)
    dw_down_EFD = gradient(w_down_EFD, d.hidden_RF, dout_TD, right_token_R=token_R)
    return dx_TD, dw_gate_EDF, dw_up_EDF, dw_down_EFD, permute.take(d.dscale_R, slot_TK)
