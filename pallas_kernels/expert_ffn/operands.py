"""What every implementation of the op takes. Dims as in api.py."""

from typing import NamedTuple

from jaxtyping import Array

from pallas_kernels.quantized import Weights


class Operands(NamedTuple):
    """Rows sorted by expert, weights, rows of each expert and the first expert that the weights hold."""

    x_RD: Array
    w_gate_EDF: Weights | None
    w_up_EDF: Weights
    w_down_EFD: Weights
    sizes_L: Array
    offset: Array | None
