"""The routed network as Pallas TPU kernels: rows are gathered on the way into the kernels that need them.

What goes back to tokens is written once, as packed rows, and a kernel sums each token's. Gates on the output touch no
kernel of the network: forward they weigh the sum over a token's rows. Backward, all rows
start from the unscaled gradient of the output, gathered; the gate, which multiplies every gradient of its row, again
weighs the sum that gives dx, and scales one side of each weight gradient. Its own gradient is the dot of the hidden
layer and that layer's unscaled gradient, so the output rows need not be kept. With gates on the input the
rows are gathered by XLA. Dims as in api.py.
"""

import functools
from typing import Any

from jaxtyping import Array

from pallas_kernels.expert_ffn import in_kernels
from pallas_kernels.expert_ffn import pallas_tpu as ffn
from pallas_kernels.permute import pallas_tpu as permute_tpu
from pallas_kernels.permute import xla as permute
from pallas_kernels.quantized import Weights
from pallas_kernels.routed_ffn import composed


def _copies_rows(x_XD: Array, rows: int) -> bool:
    """Whether kernels can copy single rows: whole lanes when packed, and an index each in scalar memory."""
    return x_XD.shape[1] % (512 // x_XD.dtype.itemsize) == 0 and rows <= permute_tpu.MAX_CHOICES


def _rows(x_TD: Array, token_R: Array) -> tuple[Array, Array | None]:
    """Tokens and the token of each row, for a kernel that gathers them; or rows, where it can't."""
    if _copies_rows(x_TD, token_R.shape[0]):
        return x_TD, token_R
    return permute.take(x_TD, token_R), None


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
    x_XD, token_R = _rows(x_TD, composed.tokens(choice_R, slot_TK))
    how = dict(activation=activation, save=save, token_R=token_R)
    hidden_RF, gate_RF, up_RF = ffn.up(x_XD, w_gate_EDF, w_up_EDF, groups, **how)
    if _copies_rows(x_TD, slot_TK.size):
        words, block = ffn.down_packed(hidden_RF, w_down_EFD, groups)
        how = dict(block=block, dtype=x_TD.dtype, interpret=interpret)
        return permute_tpu.sum_choices(words, slot_TK, gates_TK, **how), gate_RF, up_RF
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
    dout_XD, gathered_R = _rows(dout_TD, token_R)
    how = dict(activation=activation, token_R=gathered_R, of_scale=True)
    d = ffn.dhidden(dout_XD, w_down_EFD, gate_RF, up_RF, groups, **how)
    if _copies_rows(x_TD, slot_TK.size):
        words, block = ffn.dx_packed(d, w_gate_EDF, w_up_EDF, groups)
        how = dict(block=block, dtype=x_TD.dtype, interpret=interpret)
        dx_TD = permute_tpu.sum_choices(words, slot_TK, gates_TK, **how)
    else:
        dx_TD = permute.sum_choices(ffn.dx(d, w_gate_EDF, w_up_EDF, groups), slot_TK, gates_TK)
    gathered = lambda a_TD: composed.scaled(permute.take(a_TD, token_R), gate_R)
    x_RD = gathered(x_TD)
    gradient = functools.partial(in_kernels.weight_gradient, ffn, groups)
    dw_gate_EDF, dw_up_EDF = gradient(w_gate_EDF, x_RD, d.dgate_RF), gradient(w_up_EDF, x_RD, d.dup_RF)
    dw_down_EFD = gradient(w_down_EFD, d.hidden_RF, gathered(dout_TD))
    return dx_TD, dw_gate_EDF, dw_up_EDF, dw_down_EFD, permute.take(d.dscale_R, slot_TK)
