"""The expert network for a few rows, as in decoding on a CPU, where reading and copying weights is all that costs.

Dims as in api.py. For no more rows than experts, every row's weights are gathered and multiplied as a batch of vectors:
only the experts that are used are touched. XLA's CPU compiler gathers straight out of the stacked layers of a scanned
model; a loop over experts there first copies the whole layer. Measured (4 layers, D 256, float32, CPU ms a step of a
loop over experts / of this): 2 of 8 experts 13.5 / 1.7, 8 of 64 31 / 1.9, 64 rows on 64 experts 58 / 23.

For a few more rows than experts, all rows go through all experts, and what was not asked for is set to zero before the
way down: three dots that read each weight once, in place of three copies and three dots for each expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups
from pallas_kernels.expert_ffn import activations
from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.quantized import Quantized, Weights

_MOST = 256  # rows times experts of the second way


def suits(num_rows: int, num_experts: int) -> bool:
    """Whether this is the way to go."""
    return 0 < num_rows <= num_experts or 0 < num_rows * num_experts <= _MOST


def forward(
    o: Operands,
    *,
    activation: str,
) -> tuple[Array, None, None]:
    """(y, None, None): nothing is kept for a derivative, and api.py takes this where none is asked for."""
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    R, E, acc = x_RD.shape[0], w_up_EDF.shape[0], _checks.accumulator(x_RD.dtype)
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(R, dtype=ends_E.dtype), side="right")

    if R > E:
        weights = (_wide(w, acc) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
        y_RD = _everywhere(x_RD, *weights, expert_R, activation).astype(x_RD.dtype)
        return jnp.where(_groups.live_rows(starts_E, ends_E, R), y_RD, 0), None, None

    def multiply(x_RA: Array, w_EAB: Weights | None) -> Array | None:
        if w_EAB is None:
            return None
        chosen_RAB = _wide(jax.tree.map(lambda w: jnp.take(w, expert_R, axis=0, mode="clip"), w_EAB), acc)
        return jnp.einsum("ra,rab->rb", x_RA, chosen_RAB, preferred_element_type=acc)

    hidden_RF = activations.hidden(activation, multiply(x_RD, w_gate_EDF), multiply(x_RD, w_up_EDF)).astype(x_RD.dtype)
    y_RD = jnp.where(_groups.live_rows(starts_E, ends_E, R), multiply(hidden_RF, w_down_EFD), 0).astype(x_RD.dtype)
    return y_RD, None, None


def _wide(weights: Weights | None, acc) -> Array | None:
    return weights.dequantized(acc) if isinstance(weights, Quantized) else weights


def _everywhere(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_R, activation: str) -> Array:
    E, F, D = w_down_EFD.shape
    acc = _checks.accumulator(x_RD.dtype)
    x_ERD = jnp.broadcast_to(x_RD, (E, *x_RD.shape))

    def multiply(w_EDF: Array | None) -> Array | None:
        return None if w_EDF is None else jnp.einsum("erd,edf->erf", x_ERD, w_EDF, preferred_element_type=acc)

    hidden_ERF = activations.hidden(activation, multiply(w_gate_EDF), multiply(w_up_EDF)).astype(x_RD.dtype)
    asked_ER = expert_R == jnp.arange(E, dtype=expert_R.dtype)[:, None]
    hidden_ERF = jnp.where(asked_ER[..., None], hidden_ERF, 0)
    rows = hidden_ERF.transpose(1, 0, 2).reshape(-1, E * F)
    return jnp.dot(rows, w_down_EFD.reshape(E * F, D), preferred_element_type=acc)
