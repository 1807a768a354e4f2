"""The expert network for fewer rows than experts, as in decoding on a CPU: only the weights that are used are touched.

Dims as in api.py. Every row's weights are gathered and multiplied as a batch of vectors. XLA's CPU compiler gathers
straight out of the stacked layers of a scanned model; a loop over experts there first copies the whole layer. Measured
(4 layers, D 256, float32, CPU ms a step of a loop over experts / of this): 2 of 8 experts 13.5 / 1.7, 8 of 64 31 / 1.9,
64 rows on 64 experts 58 / 23.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups
from pallas_kernels.expert_ffn import activations
from pallas_kernels.quantized import Quantized, Weights


def suits(num_rows: int, num_experts: int) -> bool:
    """Whether this is the way to go."""
    return 0 < num_rows <= num_experts


def forward(
    x_RD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    w_down_EFD: Weights,
    sizes_L: Array,
    offset: Array | None,
    *,
    activation: str,
    save: bool = False,
) -> tuple[Array, None, None]:
    """(y, None, None); there is no derivative."""
    if save:
        raise NotImplementedError("xla_few keeps nothing for a derivative")
    R, E, acc = x_RD.shape[0], w_up_EDF.shape[0], _checks.accumulator(x_RD.dtype)
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(R, dtype=ends_E.dtype), side="right")

    def multiply(x_RA: Array, w_EAB: Weights | None) -> Array | None:
        if w_EAB is None:
            return None
        chosen_RAB = jax.tree.map(lambda w: jnp.take(w, expert_R, axis=0, mode="clip"), w_EAB)
        if isinstance(chosen_RAB, Quantized):
            chosen_RAB = chosen_RAB.dequantized(acc)
        return jnp.einsum("ra,rab->rb", x_RA, chosen_RAB, preferred_element_type=acc)

    hidden_RF = activations.hidden(activation, multiply(x_RD, w_gate_EDF), multiply(x_RD, w_up_EDF)).astype(x_RD.dtype)
    y_RD = jnp.where(_groups.live_rows(starts_E, ends_E, R), multiply(hidden_RF, w_down_EFD), 0).astype(x_RD.dtype)
    return y_RD, None, None
