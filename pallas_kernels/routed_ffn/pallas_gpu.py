"""The routed network's calls of Pallas GPU kernels: rows are gathered on the way into the kernels that need them.

The gathered rows are never written, forward or backward. What the way down and dx give are rows; a kernel adds up each
token's. Gates on the output weigh that sum; backward, the epilogue that makes the gradients of the pre-activations
multiplies each row by its gate, and sums up the gate's own gradient. Dims as in api.py.
"""

from functools import partial
from typing import Any

from jaxtyping import Array

from pallas_kernels.expert_ffn import in_kernels as rows
from pallas_kernels.expert_ffn import pallas_gpu as ffn
from pallas_kernels.permute import pallas_gpu as permute
from pallas_kernels.routed_ffn.operands import Operands


def up(o: Operands, groups: rows.Groups, **how: Any) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved."""
    return ffn.up(o.x_TD, o.w_gate_EDF, o.w_up_EDF, groups, token_R=o.token_R, **how)


def down(hidden_RF: Array, o: Operands, groups: rows.Groups) -> Array:
    """The result (T, D)."""
    y_RD = ffn.down(hidden_RF, o.w_down_EFD, groups)
    return permute.sum_choices(y_RD, o.slot_TK, o.gates_TK, interpret=groups.interpret)


def dhidden(
    dout_TD: Array, o: Operands, gate_RF: Array | None, up_RF: Array, groups: rows.Groups, **how: Any
) -> rows.Gradients:
    """From the gradient of the result; hidden layer and gradients are scaled."""
    return ffn.dhidden(dout_TD, o.w_down_EFD, gate_RF, up_RF, groups, token_R=o.token_R, scale_R=o.gate_R, **how)


def dx(d: rows.Gradients, o: Operands, groups: rows.Groups) -> Array:
    """The tokens' gradient (T, D)."""
    dx_RD = ffn.dx(d, o.w_gate_EDF, o.w_up_EDF, groups)
    return permute.sum_choices(dx_RD, o.slot_TK, None, interpret=groups.interpret)


def weight_gradients(d: rows.Gradients, dout_TD: Array, o: Operands, groups: rows.Groups) -> tuple[Array | None, ...]:
    """Of gate, up and down, None where they are frozen or not there."""
    gradient, token_R = partial(rows.weight_gradient, ffn, groups), o.token_R
    return (
        gradient(o.w_gate_EDF, o.x_TD, d.dgate_RF, left_token_R=token_R),
        gradient(o.w_up_EDF, o.x_TD, d.dup_RF, left_token_R=token_R),
        gradient(o.w_down_EFD, d.hidden_RF, dout_TD, right_token_R=token_R),
    )
