"""What every implementation of the op takes. Dims as in api.py."""

from typing import NamedTuple

from jaxtyping import Array

from pallas_kernels import _checks
from pallas_kernels.expert_ffn import operands as ffn
from pallas_kernels.permute import xla as permute
from pallas_kernels.quantized import Weights


class Operands(NamedTuple):
    """Tokens, weights and groups, as of expert_ffn, then which rows are a token's, with which gates."""

    x_TD: Array
    w_gate_EDF: Weights | None
    w_up_EDF: Weights
    w_down_EFD: Weights
    sizes_L: Array
    offset: Array | None
    choice_R: Array
    slot_TK: Array
    gates_TK: Array

    def of_rows(self, x_RD: Array) -> ffn.Operands:
        """What expert_ffn takes."""
        return ffn.Operands(x_RD, *self[1:6])

    @property
    def token_R(self) -> Array:
        """The token of each row; T: none."""
        return self.choice_R // max(self.slot_TK.shape[1], 1)

    @property
    def gate_R(self) -> Array:
        """The gate of each row, in float32 at least; 0: none."""
        gate_R = permute.take(self.gates_TK.reshape(-1), self.choice_R)
        return gate_R.astype(_checks.accumulator(self.x_TD.dtype))
