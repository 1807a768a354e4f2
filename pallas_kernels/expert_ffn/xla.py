"""The expert network as grouped matmuls by `jax.lax.ragged_dot`: what XLA offers on every platform.

Dims as in api.py.
"""

from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.expert_ffn import activations
from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.grouped_matmul import xla as grouped
from pallas_kernels.quantized import Quantized


def forward(
    o: Operands,
    *,
    activation: str,
    save: bool,
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved."""
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    acc = _checks.accumulator(x_RD.dtype)
    into = lambda w: None if w is None else grouped.matmul(x_RD, w, sizes_L, offset, transpose_rhs=False, out_dtype=acc)
    gate_RF, up_RF = into(w_gate_EDF), into(w_up_EDF)
    hidden_RF = activations.hidden(activation, gate_RF, up_RF).astype(x_RD.dtype)
    y_RD = grouped.matmul(hidden_RF, w_down_EFD, sizes_L, offset, transpose_rhs=False, out_dtype=x_RD.dtype)
    if not save:
        return y_RD, None, None
    return y_RD, None if gate_RF is None else gate_RF.astype(x_RD.dtype), up_RF.astype(x_RD.dtype)


def backward(
    o: Operands,
    gate_RF: Array | None,
    up_RF: Array,
    dy_RD: Array,
    scale_R: Array | None = None,
    *,
    activation: str,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """(dx, dw_gate, dw_up, dw_down, dscale), None for what is frozen or not there.

    With `scale`, dy is the gradient of scale * y.
    """
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    E, dtype, acc = w_up_EDF.shape[0], x_RD.dtype, _checks.accumulator(x_RD.dtype)
    back = lambda d, w: grouped.matmul(d, w, sizes_L, offset, transpose_rhs=True, out_dtype=acc)
    weight = lambda w, left, right: (
        None if isinstance(w, Quantized) else grouped.weight_gradient(left, right, sizes_L, offset, num_groups=E)
    )
    wide = lambda z: None if z is None else z.astype(acc)
    gradients = activations.scaled_hidden_and_gradients(
        activation, wide(gate_RF), wide(up_RF), back(dy_RD, w_down_EFD), None if scale_R is None else scale_R[:, None]
    )
    hidden_RF, dgate_RF, dup_RF, dscale_R1 = gradients
    dw_down_EFD = weight(w_down_EFD, hidden_RF.astype(dtype), dy_RD)
    dup_RF = dup_RF.astype(dtype)
    dx_RD, dw_up_EDF, dw_gate_EDF = back(dup_RF, w_up_EDF), weight(w_up_EDF, x_RD, dup_RF), None
    if w_gate_EDF is not None:
        dgate_RF = dgate_RF.astype(dtype)
        dx_RD = dx_RD + back(dgate_RF, w_gate_EDF)
        dw_gate_EDF = weight(w_gate_EDF, x_RD, dgate_RF)
    return dx_RD.astype(dtype), dw_gate_EDF, dw_up_EDF, dw_down_EFD, None if scale_R is None else dscale_R1[:, 0]
