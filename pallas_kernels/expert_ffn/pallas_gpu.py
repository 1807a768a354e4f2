"""The expert network as Pallas GPU kernels: what is computed, in which calls.

Forward: one kernel from x to the hidden layer (both products and the activation), one for the way down. Backward: one
kernel from dy to the gradients of the pre-activations (and the hidden layer again), one that sums both ways back to dx,
and one for each weight gradient. What lies between the kernels is what the backward pass keeps, and the hidden layer.
Dims as in api.py; X rows, or tokens of which rows are gathered on the way into a kernel (see routed_ffn).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _gpu_rows, _gpu_target, _gpu_tiles, _gpu_weights
from pallas_kernels._gpu_rows import Product
from pallas_kernels.expert_ffn import activations
from pallas_kernels.grouped_matmul import pallas_gpu as grouped
from pallas_kernels.quantized import Quantized, Weights

why_not = grouped.why_not
#: Columns that the epilogue of the gradients takes at a time: more of its many terms don't fit into registers.
_PART = 32
Load = Callable[[], Array]


class Groups(NamedTuple):
    """Sizes and offset of the experts at hand, and how to run: what all calls share."""

    sizes_L: Array
    offset: Array | None
    interpret: bool


class Gradients(NamedTuple):
    """The hidden layer again, the gradients of the pre-activations, and of the rows' scale."""

    hidden_RF: Array
    dgate_RF: Array | None
    dup_RF: Array
    dscale_R: Array | None


def forward(
    x_RD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    w_down_EFD: Weights,
    sizes_L: Array,
    offset: Array | None,
    *,
    activation: str,
    save: bool,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved."""
    groups = Groups(sizes_L, offset, interpret)
    hidden_RF, gate_RF, up_RF = up(x_RD, None, w_gate_EDF, w_up_EDF, groups, activation=activation, save=save)
    return down(hidden_RF, w_down_EFD, groups), gate_RF, up_RF


def backward(
    x_RD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    w_down_EFD: Weights,
    sizes_L: Array,
    offset: Array | None,
    gate_RF: Array | None,
    up_RF: Array,
    dy_RD: Array,
    scale_R: Array | None = None,
    *,
    activation: str,
    token_R: Array | None = None,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """(dx, dw_gate, dw_up, dw_down, dscale), None for what is frozen or not there.

    With `scale`, dy is the gradient of scale * y. With `token`, x and dy are tokens, row r being token[r]; dx has rows.
    """
    groups = Groups(sizes_L, offset, interpret)
    d = dhidden(dy_RD, token_R, w_down_EFD, gate_RF, up_RF, scale_R, groups, activation=activation)
    dw_gate_EDF = weight_gradient(w_gate_EDF, x_RD, d.dgate_RF, groups, left_token_R=token_R)
    dw_up_EDF = weight_gradient(w_up_EDF, x_RD, d.dup_RF, groups, left_token_R=token_R)
    dw_down_EFD = weight_gradient(w_down_EFD, d.hidden_RF, dy_RD, groups, right_token_R=token_R)
    return dx(d, w_gate_EDF, w_up_EDF, groups), dw_gate_EDF, dw_up_EDF, dw_down_EFD, d.dscale_R


# --- the calls -------------------------------------------------------------------------------------------------------


def up(
    x_XD: Array,
    token_R: Array | None,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    groups: Groups,
    *,
    activation: str,
    save: bool,
) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved. Rows are x, or with `token` x[token]."""
    weights = [w_up_EDF] if w_gate_EDF is None else [w_gate_EDF, w_up_EDF]
    phase = tuple(Product(0, i, i) for i in range(len(weights)))
    outs = 1 + save * len(weights)
    how = dict(phases=(phase,), transpose_rhs=False, epilogue=_Hidden(activation, save), outs=outs, sums=len(weights))
    hidden_RF, *pre = _call([x_XD], weights, groups, index=token_R, **how)
    if not save:
        return hidden_RF, None, None
    return hidden_RF, None if w_gate_EDF is None else pre[0], pre[-1]


def down(hidden_RF: Array, w_down_EFD: Weights, groups: Groups) -> Array:
    """y (R, D)."""
    how = dict(phases=((Product(0, 0, 0),),), transpose_rhs=False, epilogue=_gpu_rows.store, outs=1, sums=1)
    return _call([hidden_RF], [w_down_EFD], groups, **how)[0]


def dhidden(
    dy_XD: Array,
    token_R: Array | None,
    w_down_EFD: Weights,
    gate_RF: Array | None,
    up_RF: Array,
    scale_R: Array | None,
    groups: Groups,
    *,
    activation: str,
) -> Gradients:
    """From dy, or with `token` from dy[token]; the hidden layer and the gradients times the scale, if there is one."""
    pre, scaled = ([up_RF] if gate_RF is None else [gate_RF, up_RF]), scale_R is not None
    how = dict(outs=1 + len(pre), row_sums=int(scaled), sums=1, epilogue=_Gradients(activation), part_cols=_PART)
    hidden_RF, *d = _call(
        [dy_XD], [w_down_EFD], groups, index=token_R, row_inputs=pre, scale=scale_R,
        phases=((Product(0, 0, 0),),), transpose_rhs=True, **how,
    )  # fmt: skip
    dscale_R = jnp.sum(d.pop(), axis=0) if scaled else None
    return Gradients(hidden_RF, None if gate_RF is None else d[0], d[-1], dscale_R)


def dx(d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups) -> Array:
    """dx (R, D): both ways back in one sum."""
    rows, weights = ([d.dup_RF], [w_up_EDF]) if w_gate_EDF is None else ([*d[1:3]], [w_gate_EDF, w_up_EDF])
    phases = tuple((Product(i, i, 0),) for i in range(len(rows)))
    return _call(rows, weights, groups, phases=phases, transpose_rhs=True, epilogue=_gpu_rows.store, outs=1, sums=1)[0]


def weight_gradient(
    weights_EAB: Weights | None,
    left_XA: Array,
    right_XB: Array | None,
    groups: Groups,
    *,
    left_token_R: Array | None = None,
    right_token_R: Array | None = None,
) -> Array | None:
    """left.T @ right over each expert's rows: (E, A, B), or None if the weights are frozen or not there."""
    if weights_EAB is None or isinstance(weights_EAB, Quantized):
        return None
    E, A, B = weights_EAB.shape
    R = next(a for a in (left_token_R, right_token_R, left_XA) if a is not None).shape[0]
    gathers = left_token_R is not None or right_token_R is not None
    target = _gpu_target.current() or _gpu_target.SMALLEST
    tiles = _gpu_tiles.weight_tiles(R, A, B, E, left_XA.dtype.itemsize, target, gathers=gathers)
    return _weights(
        left_XA, right_XB, groups.sizes_L, groups.offset, num_groups=E, tiles=tiles, left_index_M=left_token_R,
        right_index_M=right_token_R, interpret=groups.interpret,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Pre-activations -> hidden layer, and the pre-activations themselves if they are to be saved."""

    activation: str
    save: bool

    def __call__(self, pre: list[Array], loads: list[Load], scale: Array | None) -> list[Array]:
        hidden = activations.hidden(self.activation, pre[0] if len(pre) > 1 else None, pre[-1])
        return [hidden, *pre] if self.save else [hidden]


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The hidden layer's gradient and the saved pre-activations -> hidden layer, gradients of the pre-activations.

    Then, with a scale, the dot of the hidden layer and its gradient, of each row.
    """

    activation: str

    def __call__(self, dhidden: list[Array], loads: list[Load], scale: Array | None) -> Iterator[Array]:
        # one after the other, each side loaded where it is needed: all at once don't fit into registers
        load = lambda i: loads[i]().astype(jnp.float32)
        value, slope = activations.ACTIVATIONS[self.activation](load(0))
        dhidden_RF = dhidden[0] if scale is None else dhidden[0] * scale
        up_RF = load(1) if len(loads) > 1 else None
        hidden_RF = value if up_RF is None else value * up_RF
        dot_R = None if scale is None else jnp.sum(hidden_RF * dhidden[0], axis=1)
        yield hidden_RF if scale is None else hidden_RF * scale
        yield dhidden_RF * slope if up_RF is None else dhidden_RF * up_RF * slope
        if up_RF is not None:
            yield dhidden_RF * value
        if dot_R is not None:
            yield dot_R


def _call(
    rows: list[Array],
    weights: list[Weights],
    groups: Groups,
    *,
    phases: Any,
    transpose_rhs: bool,
    epilogue: Any,
    outs: int,
    sums: int,
    row_sums: int = 0,
    part_cols: int = 0,
    index: Array | None = None,
    row_inputs: list[Array] | tuple[()] = (),
    scale: Array | None = None,
) -> list[Array]:
    """The row kernel with tiles for the target at hand; `sums` of a tile's size fill its registers."""
    E, (K, N), dtype = (
        weights[0].shape[0],
        weights[0].shape[:0:-1] if transpose_rhs else weights[0].shape[1:],
        rows[0].dtype,
    )
    R = (rows[0] if index is None else index).shape[0]
    target = _gpu_target.current() or _gpu_target.SMALLEST
    loaded = len(phases[0])
    tiles = _gpu_tiles.row_tiles(R, K, N, E, dtype.itemsize, target, rhs=loaded, sums=sums)
    parts = max(1, tiles.cols // part_cols) if part_cols else 1
    shape = (R, K, N, E, groups.sizes_L.shape[0])
    call = _gpu_rows.Call(*shape, phases, transpose_rhs, tiles, (dtype,) * outs, epilogue, row_sums, parts)
    how = dict(index_M=index, row_inputs=tuple(row_inputs), scale_M=scale, call=call, interpret=groups.interpret)
    return _run(tuple(rows), tuple(weights), groups.sizes_L, groups.offset, **how)


# Jitted for the cache: layers of one shape are traced once.
@functools.partial(jax.jit, static_argnames=("call", "interpret"))
def _run(rows, weights, sizes_L, offset, *, call, **how):
    return _gpu_rows.matmul_rows(call, rows, weights, sizes_L, offset, **how)


_weights = jax.jit(_gpu_weights.weight_gradient, static_argnames=("num_groups", "tiles", "interpret"))
