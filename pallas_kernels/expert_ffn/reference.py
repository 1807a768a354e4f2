"""The definition, in plain jnp: every expert on every row, rows of other experts masked. For tests.

Dims as in api.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups
from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.quantized import Quantized

# jax.nn's functions, not the op's own: an oracle should share no code with what it judges.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "relu": jax.nn.relu,
    "relu2": lambda z: jnp.square(jax.nn.relu(z)),
}


def forward(
    o: Operands,
    *,
    activation: str,
) -> Array:
    """y (R, D)."""
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    act = ACTIVATIONS[activation]
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, w_up_EDF.shape[0], x_RD.shape[0])
    member_ER1 = _groups.membership(starts_E, ends_E, x_RD.shape[0])[:, :, None]
    x_ERD = jnp.where(member_ER1, x_RD, 0)
    dtype = _checks.accumulator(x_RD.dtype)
    whole = lambda w: w.dequantized(dtype) if isinstance(w, Quantized) else w
    w_gate_EDF, w_up_EDF, w_down_EFD = map(whole, (w_gate_EDF, w_up_EDF, w_down_EFD))
    into = lambda w_EDF: jnp.einsum("erd,edf->erf", x_ERD, w_EDF, preferred_element_type=dtype)
    up_ERF = into(w_up_EDF)
    hidden_ERF = act(up_ERF) if w_gate_EDF is None else act(into(w_gate_EDF)) * up_ERF
    y_RD = jnp.einsum("erf,efd->rd", hidden_ERF.astype(x_RD.dtype), w_down_EFD, preferred_element_type=dtype)
    # Changes no value: it keeps what the gradient holds in dead rows out of the weights' gradients.
    return jnp.where(_groups.live_rows(starts_E, ends_E, x_RD.shape[0]), y_RD, 0).astype(x_RD.dtype)
