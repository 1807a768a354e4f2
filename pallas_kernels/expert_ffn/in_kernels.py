"""The expert network as Pallas kernels: which calls it takes, the same on TPUs and GPUs.

Forward: one kernel from x to the hidden layer (both products and the activation), one for the way down. Backward: one
kernel from dy to the gradients of the pre-activations (and the hidden layer again), one that sums both ways back to dx,
and one for each weight gradient. What lies between the kernels is what the backward pass keeps, and the hidden layer.

The calls themselves are those of a module: `up`, `down`, `dhidden`, `dx` and `weight_gradient` of pallas_tpu,
pallas_gpu or mosaic_gpu. Dims as in api.py.
"""

import functools
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array

from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.quantized import Quantized, Weights


class Groups(NamedTuple):
    """Sizes and offset of the experts at hand, and how to run: what all calls share."""

    sizes_L: Array
    offset: Array | None
    interpret: bool


class Gradients(NamedTuple):
    """The hidden layer again, the gradients of the pre-activations, and of the rows' scale if there is one."""

    hidden_RF: Array
    dgate_RF: Array | None
    dup_RF: Array
    dscale_R: Array | None = None


class Calls(Protocol):
    """The kernels of one back end. Some can do more: gather rows, scale them."""

    def up(
        self, x_RD: Array, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups, *, activation: str, save: bool
    ) -> tuple[Array, Array | None, Array | None]:
        """(hidden, gate, up), the latter two None if not to be saved."""

    def down(self, hidden_RF: Array, w_down_EFD: Weights, groups: Groups) -> Array:
        """y (R, D)."""

    def dhidden(
        self, dy_RD: Array, w_down_EFD: Weights, gate_RF: Array | None, up_RF: Array, groups: Groups, *, activation: str
    ) -> Gradients:
        """From the gradient of y and the saved pre-activations."""

    def dx(self, d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups) -> Array:
        """dx (R, D): both ways back in one sum."""

    def weight_gradient(self, left_RA: Array, right_RB: Array, groups: Groups, *, num_experts: int) -> Array:
        """left.T @ right over each expert's rows: (E, A, B)."""


def forward(
    calls: Calls,
    o: Operands,
    *,
    interpret: bool = False,
    **how: Any,
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved. how: activation, save."""
    groups = Groups(o.sizes_L, o.offset, interpret)
    hidden_RF, gate_RF, up_RF = calls.up(o.x_RD, o.w_gate_EDF, o.w_up_EDF, groups, **how)
    return calls.down(hidden_RF, o.w_down_EFD, groups), gate_RF, up_RF


def backward(
    calls: Calls,
    o: Operands,
    gate_RF: Array | None,
    up_RF: Array,
    dy_RD: Array,
    *,
    activation: str,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None, Array | None, None]:
    """(dx, dw_gate, dw_up, dw_down, None), None for what is frozen or not there."""
    groups = Groups(o.sizes_L, o.offset, interpret)
    d = calls.dhidden(dy_RD, o.w_down_EFD, gate_RF, up_RF, groups, activation=activation)
    gradient = functools.partial(weight_gradient, calls, groups)
    dw_gate_EDF, dw_up_EDF = gradient(o.w_gate_EDF, o.x_RD, d.dgate_RF), gradient(o.w_up_EDF, o.x_RD, d.dup_RF)
    dw_down_EFD = gradient(o.w_down_EFD, d.hidden_RF, dy_RD)
    return calls.dx(d, o.w_gate_EDF, o.w_up_EDF, groups), dw_gate_EDF, dw_up_EDF, dw_down_EFD, None


def weight_gradient(
    calls: Calls, groups: Groups, weights_EAB: Weights | None, left_RA: Array, right_RB: Array | None, **how: Any
) -> Array | None:
    """The gradient of these weights, or None if they are frozen or not there."""
    if weights_EAB is None or isinstance(weights_EAB, Quantized):
        return None
    return calls.weight_gradient(left_RA, right_RB, groups, num_experts=weights_EAB.shape[0], **how)


def ways_back(d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights) -> tuple[list[Array], list[Weights]]:
    """Rows, and the weights that take them back to dx."""
    if w_gate_EDF is None:
        return [d.dup_RF], [w_up_EDF]
    return [d.dgate_RF, d.dup_RF], [w_gate_EDF, w_up_EDF]
