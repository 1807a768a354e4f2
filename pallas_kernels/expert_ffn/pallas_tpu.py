"""The expert network as Pallas TPU kernels: what is computed, in which calls.

Forward: one kernel from x to the hidden layer (both products and the activation), one for the way down. Backward: one
kernel from dy to the gradients of the pre-activations (and the hidden layer again), one that sums both ways back to dx,
and the weight gradients. Dims as in api.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_rows, _tpu_target
from pallas_kernels.expert_ffn import activations, pallas_tpu_tiles
from pallas_kernels.grouped_matmul import xla as grouped


def refuses(dtype: Any) -> str | None:
    """Why these kernels don't take rows of `dtype`, or None."""
    return None if dtype in (jnp.float32, jnp.bfloat16) else f"the kernel takes float32 and bfloat16, not {dtype}"


def forward(
    x_RD: Array,
    w_gate_EDF: Array | None,
    w_up_EDF: Array,
    w_down_EFD: Array,
    sizes_L: Array,
    offset: Array | None,
    *,
    activation: str,
    save: bool,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved."""
    run = _Runner(sizes_L, offset, interpret)
    gated = w_gate_EDF is not None
    weights = (w_gate_EDF, w_up_EDF) if gated else (w_up_EDF,)

    end = _Hidden(activation, save)
    hidden_RF, *saved = run("expert_ffn_up", (x_RD,), weights, (), end, 1 + save * len(weights))
    (y_RD,) = run("expert_ffn_down", (hidden_RF,), (w_down_EFD,), (), _total, 1)
    if not save:
        return y_RD, None, None
    return y_RD, saved[0] if gated else None, saved[-1]


def backward(
    x_RD: Array,
    w_gate_EDF: Array | None,
    w_up_EDF: Array,
    w_down_EFD: Array,
    sizes_L: Array,
    offset: Array | None,
    gate_RF: Array | None,
    up_RF: Array,
    dy_RD: Array,
    *,
    activation: str,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array, Array]:
    """(dx, dw_gate or None, dw_up, dw_down)."""
    run = _Runner(sizes_L, offset, interpret)
    gated = w_gate_EDF is not None
    sides, end = (gate_RF, up_RF) if gated else (up_RF,), _Gradients(activation)
    hidden_RF, *d_RF = run("expert_ffn_dhidden", (dy_RD,), (w_down_EFD,), sides, end, 1 + len(sides), transpose=True)
    weights = (w_gate_EDF, w_up_EDF) if gated else (w_up_EDF,)
    (dx_RD,) = run("expert_ffn_dx", tuple(d_RF), weights, (), _total, 1, transpose=True)
    weight = functools.partial(grouped.weight_gradient, sizes_L=sizes_L, offset=offset, num_groups=w_up_EDF.shape[0])
    dw_gate_EDF = weight(x_RD, d_RF[0]) if gated else None
    return dx_RD, dw_gate_EDF, weight(x_RD, d_RF[-1]), weight(hidden_RF, dy_RD)


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Pre-activations -> hidden layer, and the pre-activations themselves if they are to be saved."""

    activation: str
    save: bool

    def __call__(self, pre: list[Array], _: list[Array]) -> tuple[Array, ...]:
        hidden = activations.hidden(self.activation, pre[0] if len(pre) > 1 else None, pre[-1])
        return (hidden, *pre) if self.save else (hidden,)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The hidden layer's gradient and the saved pre-activations -> hidden layer, gradients of the pre-activations."""

    activation: str

    def __call__(self, dhidden: list[Array], pre: list[Array]) -> tuple[Array, ...]:
        gate = pre[0] if len(pre) > 1 else None
        gradients = activations.hidden_and_gradients(self.activation, gate, pre[-1], dhidden[0])
        return tuple(a for a in gradients if a is not None)


def _total(products: list[Array], _: list[Array]) -> tuple[Array, ...]:
    return (sum(products[1:], products[0]),)


class _Runner:
    """Calls the row kernel: fills rows up to whole sublanes, picks tiles for the target at hand."""

    def __init__(self, sizes_L: Array, offset: Array | None, interpret: bool):
        self.sizes_L = sizes_L.astype(jnp.int32)
        self.offset_1 = jnp.zeros(1, jnp.int32) if offset is None else offset.astype(jnp.int32).reshape(1)
        self.interpret = pltpu.InterpretParams() if interpret else False
        self.target = _tpu_target.current()

    def __call__(
        self,
        name: str,
        rows: tuple[Array, ...],
        weights: tuple[Array, ...],
        sides: tuple[Array, ...],
        end: Callable[..., Any],
        num_outs: int,
        *,
        transpose: bool = False,
        token_R: Array | None = None,
    ) -> tuple[Array, ...]:
        R = (rows[0] if token_R is None else token_R).shape[0]
        fill = -R % 8
        if fill and token_R is not None:
            token_R = jnp.pad(token_R, (0, fill))
        elif fill:
            rows, sides = ([jnp.pad(a, ((0, fill), (0, 0))) for a in arrays] for arrays in (rows, sides))
        shape = pallas_tpu_tiles.Shape(
            R + fill, *(weights[0].shape[:0:-1] if transpose else weights[0].shape[1:]), weights[0].shape[0],
            len(rows), len(weights), len(sides), num_outs, weights[0].dtype.itemsize,
        )  # fmt: skip
        outs = _tpu_rows.multiply(
            tuple(rows),
            weights,
            tuple(sides),
            self.sizes_L,
            self.offset_1,
            token_R,
            end=end,
            num_outs=num_outs,
            transpose=transpose,
            tiles=pallas_tpu_tiles.tiles(shape, self.target),
            num_cores=self.target.num_cores,
            name=name,
            interpret=self.interpret,
        )
        return tuple(a[:R] for a in outs) if fill else tuple(outs)
