"""The expert network's calls of Pallas TPU kernels (in_kernels.py says what is computed in which).

Dims as in api.py. `up` and `dhidden` can gather their rows from tokens on the way: see routed_ffn.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_rows, _tpu_target, _varying, quantized
from pallas_kernels.expert_ffn import activations, pallas_tpu_tiles
from pallas_kernels.expert_ffn.in_kernels import Gradients, Groups, ways_back
from pallas_kernels.grouped_matmul import pallas_tpu as grouped
from pallas_kernels.quantized import Weights


def why_not(x_XD: Array, w_up_EDF: Weights, asked: str | None) -> str | None:
    """Why these kernels can't take rows or tokens `x` and such weights; None if they can."""
    return grouped.why_not(x_XD, w_up_EDF, transpose_rhs=False, out_dtype=x_XD.dtype, asked=asked)


def up(
    x_XD: Array,
    w_gate_EDF: Weights | None,
    w_up_EDF: Weights,
    groups: Groups,
    *,
    activation: str,
    save: bool,
    token_R: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """(hidden, gate, up), the latter two None if not to be saved. Rows are x, or with `token` x[token]."""
    weights = (w_up_EDF,) if w_gate_EDF is None else (w_gate_EDF, w_up_EDF)
    end = _Hidden(activation, save)
    hidden_RF, *pre = _call(
        "expert_ffn_up", (x_XD,), token_R, weights, (), groups, end, 1 + save * len(weights), transpose=False
    )
    if not save:
        return hidden_RF, None, None
    return hidden_RF, None if w_gate_EDF is None else pre[0], pre[-1]


class PackedRows(NamedTuple):
    """Rows that the combine kernel can fetch one by one: see _tpu_rows.pack_rows."""

    words: Array
    block: int


def down(hidden_RF: Array, w_down_EFD: Weights, groups: Groups) -> Array:
    """y (R, D)."""
    sizes_L, offset, interpret = groups
    how = dict(transpose_rhs=False, out_dtype=hidden_RF.dtype, interpret=interpret)
    return grouped.matmul(hidden_RF, w_down_EFD, sizes_L, offset, **how)


def dhidden(
    dy_XD: Array,
    w_down_EFD: Weights,
    gate_RF: Array | None,
    up_RF: Array,
    groups: Groups,
    *,
    activation: str,
    token_R: Array | None = None,
    of_scale: bool = False,
) -> Gradients:
    """From dy, or with `token` from dy[token]; of_scale: with the gradient of a scale of y's rows."""
    sides = (up_RF,) if gate_RF is None else (gate_RF, up_RF)
    # With a gate the dot follows from what there is: hidden * dhidden = up * dup.
    with_dot = of_scale and gate_RF is None
    end = _Gradients(activation, with_dot)
    hidden_RF, *d, last_RF = _call(
        "expert_ffn_dhidden", (dy_XD,), token_R, (w_down_EFD,), sides, groups, end, 1 + len(sides) + with_dot,
        transpose=True,
    )  # fmt: skip
    if gate_RF is not None:
        dscale_R = jnp.sum(up_RF.astype(jnp.float32) * last_RF.astype(jnp.float32), axis=1) if of_scale else None
        return Gradients(hidden_RF, d[0], last_RF, dscale_R)
    if of_scale:
        return Gradients(hidden_RF, None, d[0], jnp.sum(last_RF.astype(jnp.float32), axis=1))
    return Gradients(hidden_RF, None, last_RF, None)


def down_packed(hidden_RF: Array, w_down_EFD: Weights, groups: Groups) -> PackedRows:
    """The same for the combine kernel."""
    return _call_packed("expert_ffn_down", (hidden_RF,), (w_down_EFD,), groups, transpose=False)


def dx_packed(d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups) -> PackedRows:
    """dx for the combine kernel."""
    return _call_packed("expert_ffn_dx", *ways_back(d, w_gate_EDF, w_up_EDF), groups, transpose=True)


def _call_packed(name: str, rows: Any, weights: Any, groups: Groups, *, transpose: bool) -> PackedRows:
    shape = _shape(rows, None, weights, (), 1, transpose, pack_outs=True)
    tiles = pallas_tpu_tiles.tiles(shape, _tpu_target.current())
    (words,) = _call(name, rows, None, weights, (), groups, _total, 1, transpose=transpose, pack_outs=True)
    return PackedRows(words, tiles.body_cols)


def dx(d: Gradients, w_gate_EDF: Weights | None, w_up_EDF: Weights, groups: Groups) -> Array:
    """dx (R, D): both ways back in one sum."""
    rows, weights = ways_back(d, w_gate_EDF, w_up_EDF)
    return _call("expert_ffn_dx", rows, None, weights, (), groups, _total, 1, transpose=True)[0]


def weight_gradient(left_RA: Array, right_RB: Array, groups: Groups, *, num_experts: int) -> Array:
    """left.T @ right over each expert's rows: (E, A, B)."""
    how = dict(num_groups=num_experts, interpret=groups.interpret)
    return grouped.weight_gradient(left_RA, right_RB, groups.sizes_L, groups.offset, **how)


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
    """The hidden layer's gradient and the saved pre-activations -> hidden layer, gradients of the pre-activations.

    Then, if asked for, the product of the hidden layer and its gradient.
    """

    activation: str
    product: bool

    def __call__(self, dhidden: list[Array], pre: list[Array]) -> tuple[Array, ...]:
        gate = pre[0] if len(pre) > 1 else None
        gradients = activations.hidden_and_gradients(self.activation, gate, pre[-1], dhidden[0])
        outs = tuple(a for a in gradients if a is not None)
        return (*outs, outs[0] * dhidden[0]) if self.product else outs


def _total(products: list[Array], _: list[Array]) -> tuple[Array, ...]:
    return (sum(products[1:], products[0]),)


def _call(
    name: str,
    rows: Sequence[Array],
    token_R: Array | None,
    weights: Sequence[Weights],
    sides: tuple[Array, ...],
    groups: Groups,
    end: Callable[..., Any],
    num_outs: int,
    *,
    transpose: bool,
    pack_outs: bool = False,
) -> tuple[Array, ...]:
    """The row kernel, with rows filled up to whole sublanes and tiles for the target at hand."""
    target = _tpu_target.current()
    shape = _shape(rows, token_R, weights, sides, num_outs, transpose, pack_outs)
    sizes_L, offset, interpret = groups
    both = [quantized.scales(w, 2 if transpose else 1) for w in weights]
    scales = tuple(inner if outer is None else outer for inner, outer in both)
    of = tuple("inner" if inner is not None else "outer" if outer is not None else None for inner, outer in both)
    return _run(
        tuple(rows), token_R, tuple(map(quantized.values, weights)), scales, sides, sizes_L, offset, scale_of=of,
        end=end, num_outs=num_outs, transpose=transpose, name=name, tiles=pallas_tpu_tiles.tiles(shape, target),
        num_cores=1 if interpret else target.num_cores, interpret=interpret, pack_outs=pack_outs,
    )  # fmt: skip


def _shape(rows, token_R, weights, sides, num_outs: int, transpose: bool, pack_outs: bool) -> pallas_tpu_tiles.Shape:
    R = (rows[0] if token_R is None else token_R).shape[0]
    K, N = weights[0].shape[:0:-1] if transpose else weights[0].shape[1:]
    counts = (len(rows), len(weights), len(sides), num_outs)
    itemsizes = rows[0].dtype.itemsize, weights[0].dtype.itemsize
    return pallas_tpu_tiles.Shape(R + -R % 8, K, N, weights[0].shape[0], *counts, *itemsizes, pack_outs)


# Jitted for the cache: layers of one shape are traced once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "scale_of", "end", "num_outs", "transpose", "name", "tiles", "num_cores", "interpret", "pack_outs",
    ),
)  # fmt: skip
def _run(rows, token_R, weights, scales, sides, sizes_L, offset, *, interpret, **how):
    dtype, scales = rows[0].dtype, tuple(None if a is None else a[:, None] for a in scales)
    R = (rows[0] if token_R is None else token_R).shape[0]
    fill = -R % 8
    pad = lambda a: jnp.pad(a, ((0, fill),) + ((0, 0),) * (a.ndim - 1)) if fill else a
    if token_R is None:
        rows = tuple(map(pad, rows))
    else:
        # Dead rows may point beyond the tokens: what they fetch reaches nothing, but it must be there.
        token_R, rows = jnp.minimum(pad(token_R), rows[0].shape[0] - 1), (_tpu_rows.pack_rows(rows[0]),)
    if offset is None:
        offset = _varying.zeros_like_varying((), jnp.int32, sizes_L)
    outs = _tpu_rows.multiply(
        rows, weights, scales, tuple(map(pad, sides)), sizes_L.astype(jnp.int32), offset.reshape(1), token_R, **how,
        dtype=dtype, interpret=pltpu.InterpretParams() if interpret else False,
    )  # fmt: skip
    return tuple(a[:R] for a in outs)
