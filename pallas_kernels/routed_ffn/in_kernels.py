"""The routed network as Pallas kernels: which calls it takes, the same on TPUs and GPUs.

Those of expert_ffn's in_kernels, from tokens and to tokens. Gates on the output touch no kernel forward but the sum
over a token's rows, which they weigh. With gates on the input, rows are gathered and combined by XLA, and the kernels
are expert_ffn's.

The calls themselves are those of a module, pallas_tpu or pallas_gpu. Dims as in api.py.
"""

from functools import partial
from types import ModuleType
from typing import Any, Protocol

from jaxtyping import Array

from pallas_kernels.expert_ffn import in_kernels as rows
from pallas_kernels.permute import xla as permute
from pallas_kernels.routed_ffn import composed
from pallas_kernels.routed_ffn.operands import Operands


class Calls(Protocol):
    """The kernels of one back end.

    ffn: expert_ffn's module of the same.
    """

    ffn: ModuleType

    def up(
        self, o: Operands, groups: rows.Groups, *, activation: str, save: bool
    ) -> tuple[Array, Array | None, Array | None]:
        """(hidden, gate, up), the latter two None if not to be saved."""

    def down(self, hidden_RF: Array, o: Operands, groups: rows.Groups) -> Array:
        """The result (T, D)."""

    def dhidden(
        self, dout_TD: Array, o: Operands, gate_RF: Array | None, up_RF: Array, groups: rows.Groups, *, activation: str
    ) -> rows.Gradients:
        """From the gradient of the result; that of the scale is the gates', of each row."""

    def dx(self, d: rows.Gradients, o: Operands, groups: rows.Groups) -> Array:
        """The tokens' gradient (T, D)."""

    def weight_gradients(
        self, d: rows.Gradients, dout_TD: Array, o: Operands, groups: rows.Groups
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Of gate, up and down, None where they are frozen or not there."""


def forward(
    calls: Calls, o: Operands, *, gate_on: str, interpret: bool = False, **how: Any
) -> tuple[Array, Array | None, Array | None]:
    """(out, gate, up): the pre-activations of the live rows, None if not to be saved. how: activation, save."""
    if gate_on == "input":
        return composed.forward(partial(rows.forward, calls.ffn, interpret=interpret), o, gate_on=gate_on, **how)
    groups = rows.Groups(o.sizes_L, o.offset, interpret)
    hidden_RF, gate_RF, up_RF = calls.up(o, groups, **how)
    return calls.down(hidden_RF, o, groups), gate_RF, up_RF


def backward(
    calls: Calls,
    o: Operands,
    gate_RF: Array | None,
    up_RF: Array,
    dout_TD: Array,
    *,
    gate_on: str,
    activation: str,
    interpret: bool = False,
) -> composed.Gradients:
    """From the gradient of the result and the saved pre-activations."""
    if gate_on == "input":
        rows_backward = partial(rows.backward, calls.ffn, interpret=interpret)
        return composed.backward(rows_backward, o, gate_RF, up_RF, dout_TD, gate_on=gate_on, activation=activation)
    groups = rows.Groups(o.sizes_L, o.offset, interpret)
    d = calls.dhidden(dout_TD, o, gate_RF, up_RF, groups, activation=activation)
    dx_TD, dweights = calls.dx(d, o, groups), calls.weight_gradients(d, dout_TD, o, groups)
    return composed.Gradients(dx_TD, *dweights, permute.take(d.dscale_R, o.slot_TK))
