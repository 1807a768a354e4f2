"""The routed network's calls of Pallas TPU kernels: rows are gathered on the way into the kernels that need them.

What goes back to tokens is written once, as packed rows, and a kernel sums each token's. Gates on the output touch no
kernel of the network: forward they weigh the sum over a token's rows. Backward, all rows
start from the unscaled gradient of the output, gathered; the gate, which multiplies every gradient of its row, again
weighs the sum that gives dx, and scales one side of each weight gradient. Its own gradient is the dot of the hidden
layer and that layer's unscaled gradient, so the output rows need not be kept. Dims as in api.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Array

from pallas_kernels.expert_ffn import in_kernels as rows
from pallas_kernels.expert_ffn import pallas_tpu as ffn
from pallas_kernels.permute import pallas_tpu as permute_tpu
from pallas_kernels.permute import xla as permute
from pallas_kernels.routed_ffn.composed import scaled
from pallas_kernels.routed_ffn.operands import Operands


def _copies_rows(x_XD: Array, rows: int) -> bool:
    """Whether kernels can copy single rows: whole lanes when packed, and an index each in scalar memory."""
    return x_XD.shape[1] % (512 // x_XD.dtype.itemsize) == 0 and rows <= permute_tpu.MAX_CHOICES


def _gathered(x_TD: Array, token_R: Array) -> tuple[Array, Array | None]:
    """Tokens and the token of each row, for a kernel that gathers them; or rows, where it can't."""
    if _copies_rows(x_TD, token_R.shape[0]):
        return x_TD, token_R
    return permute.take(x_TD, token_R), None


def _to_tokens(
    packed: Callable[..., ffn.PackedRows], plain: Callable[..., Array], o: Operands, groups: rows.Groups, *args: Any
) -> Array:
    """Each token's rows, out of either of the two calls, times their gates."""
    if not _copies_rows(o.x_TD, o.slot_TK.size):
        return permute.sum_choices(plain(*args, groups), o.slot_TK, o.gates_TK)
    words, block = packed(*args, groups)
    how = dict(block=block, dtype=o.x_TD.dtype, interpret=groups.interpret)
    return permute_tpu.sum_choices(words, o.slot_TK, o.gates_TK, **how)


def up(o: Operands, groups: rows.Groups, **how: Any) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved."""
    x_XD, token_R = _gathered(o.x_TD, o.token_R)
    return ffn.up(x_XD, o.w_gate_EDF, o.w_up_EDF, groups, token_R=token_R, **how)


def down(hidden_RF: Array, o: Operands, groups: rows.Groups) -> Array:
    """The result (T, D)."""
    return _to_tokens(ffn.down_packed, ffn.down, o, groups, hidden_RF, o.w_down_EFD)


def dhidden(
    dout_TD: Array, o: Operands, gate_RF: Array | None, up_RF: Array, groups: rows.Groups, **how: Any
) -> rows.Gradients:
    """From the gradient of the result; nothing is scaled."""
    dout_XD, token_R = _gathered(dout_TD, o.token_R)
    return ffn.dhidden(dout_XD, o.w_down_EFD, gate_RF, up_RF, groups, token_R=token_R, of_scale=True, **how)


def dx(d: rows.Gradients, o: Operands, groups: rows.Groups) -> Array:
    """The tokens' gradient (T, D)."""
    return _to_tokens(ffn.dx_packed, ffn.dx, o, groups, d, o.w_gate_EDF, o.w_up_EDF)


def weight_gradients(d: rows.Gradients, dout_TD: Array, o: Operands, groups: rows.Groups) -> tuple[Array | None, ...]:
    """Of gate, up and down, None where they are frozen or not there."""
    token_R, gate_R = o.token_R, o.gate_R
    x_RD, dout_RD = (scaled(permute.take(a_TD, token_R), gate_R) for a_TD in (o.x_TD, dout_TD))
    gradient = partial(rows.weight_gradient, ffn, groups)
    return (
        gradient(o.w_gate_EDF, x_RD, d.dgate_RF),
        gradient(o.w_up_EDF, x_RD, d.dup_RF),
        gradient(o.w_down_EFD, d.hidden_RF, dout_RD),
    )
