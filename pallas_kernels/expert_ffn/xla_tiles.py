"""The expert network as one fused loop over experts and row tiles, for CPUs.

Dims as in api.py; r: rows of a tile. Per expert the weights are sliced once, per tile the hidden layer stays in the
cache, and weight gradients are summed in one expert's space before they are written, once.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from pallas_kernels import _checks, _groups, _tiles, _varying
from pallas_kernels.expert_ffn import activations
from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.quantized import Quantized, Weights


class _Weights(NamedTuple):
    """Of all experts (with a leading E), of one expert, or their gradients (None: frozen). gate may be None."""

    gate_DF: Weights | None
    up_DF: Weights | None
    down_FD: Weights | None


def _dot(a: Array, b: Weights | None, contract: tuple[int, int]) -> Array | None:
    return None if b is None else _tiles.dot(a, b, contract)


def _map(f, *trees):
    """f on each present array: None is an empty tree."""
    return jax.tree.map(f, *trees)


def _pick(weights: _Weights, e: Array, dtype: Any) -> _Weights:
    return _Weights(*(None if w is None else _tiles.pick_group(w, e, dtype) for w in weights))


def _any_quantized(weights: _Weights) -> bool:
    return any(isinstance(w, Quantized) for w in weights)


def forward(
    o: Operands,
    *,
    activation: str,
    save: bool,
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved."""
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    R, (E, _, F) = x_RD.shape[0], w_up_EDF.shape
    zeros = lambda width, n: _varying.zeros_like_varying((R, width), x_RD.dtype, x_RD, own=(sizes_L[0], n))
    gate_RF = zeros(F, 1) if save and w_gate_EDF is not None else None
    out = (zeros(x_RD.shape[1], 0), gate_RF, zeros(F, 2) if save else None)
    if R == 0:
        return out
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)

    weights = _Weights(w_gate_EDF, w_up_EDF, w_down_EFD)

    def expert(out, e: Array):
        w = _pick(weights, e, x_RD.dtype)

        def tile(out, row: Array, rows: int, live: Array | None, opens: bool):
            x_rD = _tiles.take_rows(x_RD, row, rows)
            gate_rF, up_rF = _dot(x_rD, w.gate_DF, (1, 0)), _dot(x_rD, w.up_DF, (1, 0))
            hidden_rF = activations.hidden(activation, gate_rF, up_rF).astype(x_RD.dtype)
            tiles = (_dot(hidden_rF, w.down_FD, (1, 0)), gate_rF if save else None, up_rF if save else None)
            return _map(lambda out, tile: _tiles.put_rows(out, tile, row, live), out, tiles)

        return _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, out)

    return _tiles.for_each_group(starts_E, ends_E, expert, out, skip_empty=_any_quantized(weights))


def backward(
    o: Operands,
    gate_RF: Array | None,
    up_RF: Array,
    dy_RD: Array,
    scale_R: Array | None = None,
    *,
    activation: str,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """(dx, dw_gate, dw_up, dw_down, dscale), None for what is frozen or not there.

    With `scale`, dy is the gradient of scale * y.
    """
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset = o
    R, E, acc = x_RD.shape[0], w_up_EDF.shape[0], _checks.accumulator(x_RD.dtype)
    weights = _Weights(w_gate_EDF, w_up_EDF, w_down_EFD)
    zeros = lambda shape, dtype, n: _varying.zeros_like_varying(shape, dtype, x_RD, own=(sizes_L[0], n))
    trained = _Weights(*(None if isinstance(w, Quantized) else w for w in weights))
    dx_RD = zeros(x_RD.shape, x_RD.dtype, 3)
    dw = _Weights(*(None if w is None else zeros(w.shape, w.dtype, n) for n, w in enumerate(trained, 4)))
    outs = (dx_RD, None if scale_R is None else zeros((R, 1), acc, 7))
    scale_R1 = None if scale_R is None else scale_R[:, None]
    if R == 0:
        return (dx_RD, *dw, scale_R)
    # The sums of the expert at hand. What they hold when the next one begins is never read.
    sums = _Weights(*(None if w is None else zeros(w.shape[1:], acc, n) for n, w in enumerate(trained, 8)))
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)

    def expert(carry, e: Array):
        w = _pick(weights, e, x_RD.dtype)

        def tile(carry, row: Array, rows: int, live: Array | None, opens: bool):
            outs, sums = carry
            take = lambda a: None if a is None else _tiles.take_rows(a, row, rows, live)
            pre = (take(gate_RF), take(up_RF))
            tiles, dw = _tile_gradients(activation, take(x_RD), pre, take(dy_RD), take(scale_R1), w)
            sums = _map(lambda sum, d: _tiles.add_matrix(sum, d, opens), sums, dw)
            return _map(lambda out, tile: _tiles.put_rows(out, tile, row, live), outs, tiles), sums

        outs, dw, sums = carry
        outs, sums = _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, (outs, sums))
        has_rows = ends_E[e] > starts_E[e]
        return outs, _map(lambda out, sum: _tiles.put_matrix(out, sum, e, has_rows), dw, sums), sums

    skip_empty = _any_quantized(weights)
    (dx_RD, dscale_R1), dw, _ = _tiles.for_each_group(starts_E, ends_E, expert, (outs, dw, sums), skip_empty=skip_empty)
    return (dx_RD, *dw, None if scale_R is None else dscale_R1[:, 0])


def _tile_gradients(
    activation: str, x_rD: Array, pre: tuple[Array | None, Array], dy_rD: Array, scale_r1: Array | None, w: _Weights
) -> tuple[tuple[Array, Array | None], _Weights]:
    """dx and dscale of one tile, and what the tile adds to the weight gradients."""
    dtype, acc = x_rD.dtype, _checks.accumulator(x_rD.dtype)
    gate_rF, up_rF = _map(lambda z: z.astype(acc), pre)
    dhidden_rF = _dot(dy_rD, w.down_FD, (1, 1))
    *gradients, dscale_r1 = activations.scaled_hidden_and_gradients(activation, gate_rF, up_rF, dhidden_rF, scale_r1)
    hidden_rF, dgate_rF, dup_rF = _map(lambda z: z.astype(dtype), gradients)
    dx_rD = _dot(dup_rF, w.up_DF, (1, 1))
    if dgate_rF is not None:
        dx_rD = dx_rD + _dot(dgate_rF, w.gate_DF, (1, 1))
    x_Dr = _tiles.transposed(x_rD)
    frozen = lambda w: isinstance(w, Quantized)
    return (dx_rD, dscale_r1), _Weights(
        None if frozen(w.gate_DF) or dgate_rF is None else _dot(x_Dr, dgate_rF, (1, 0)),
        None if frozen(w.up_DF) else _dot(x_Dr, dup_rF, (1, 0)),
        None if frozen(w.down_FD) else _dot(hidden_rF, dy_rD, (0, 0)),
    )
