"""The expert network as one fused loop over experts and row tiles, for CPUs.

Dims as in api.py; r: rows of a tile. Per expert the weights are sliced once, per tile the hidden layer stays in the
cache, and weight gradients are summed in one expert's space before they are written, once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups, _tiles, _varying
from pallas_kernels.expert_ffn import activations


class _Weights(NamedTuple):
    """Of all experts (with a leading E), of one expert, or their gradients. gate may be None."""

    gate_DF: Array | None
    up_DF: Array
    down_FD: Array


def _dot(a: Array, b: Array | None, contract: tuple[int, int]) -> Array | None:
    if b is None:
        return None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_checks.accumulator(a.dtype))


def _map(f, *trees):
    """f on each present array: None is an empty tree."""
    return jax.tree.map(f, *trees)


def _pick(weights: _Weights, e: Array) -> _Weights:
    return _map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False), weights)


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
) -> tuple[Array, Array | None, Array | None]:
    """(y, gate, up): the pre-activations of the live rows, None if not to be saved."""
    R, (E, _, F) = x_RD.shape[0], w_up_EDF.shape
    zeros = lambda width, **how: _varying.zeros_like_varying((R, width), x_RD.dtype, x_RD, **how)
    gate_RF = zeros(F) if save and w_gate_EDF is not None else None
    out = (zeros(x_RD.shape[1]), gate_RF, zeros(F, negative=True) if save else None)
    if R == 0:
        return out
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)

    def expert(e: Array, out):
        w = _pick(_Weights(w_gate_EDF, w_up_EDF, w_down_EFD), e)

        def tile(out, row: Array, rows: int, live: Array | None, opens: bool):
            x_rD = _tiles.take_rows(x_RD, row, rows)
            gate_rF, up_rF = _dot(x_rD, w.gate_DF, (1, 0)), _dot(x_rD, w.up_DF, (1, 0))
            hidden_rF = activations.hidden(activation, gate_rF, up_rF).astype(x_RD.dtype)
            tiles = (_dot(hidden_rF, w.down_FD, (1, 0)), gate_rF if save else None, up_rF if save else None)
            return _map(lambda out, tile: _tiles.put_rows(out, tile, row, live), out, tiles)

        return _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, out)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(E), expert, out)


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
) -> tuple[Array, Array | None, Array, Array]:
    """(dx, dw_gate or None, dw_up, dw_down)."""
    R, E, acc = x_RD.shape[0], w_up_EDF.shape[0], _checks.accumulator(x_RD.dtype)
    weights = _Weights(w_gate_EDF, w_up_EDF, w_down_EFD)
    zeros = lambda shape, dtype, **how: _varying.zeros_like_varying(shape, dtype, x_RD, **how)
    dx_RD, dw = zeros(x_RD.shape, x_RD.dtype), _map(lambda w: zeros(w.shape, w.dtype), weights)
    dw = dw._replace(up_DF=zeros(w_up_EDF.shape, x_RD.dtype, negative=True))
    if R == 0:
        return (dx_RD, *dw)
    # The sums of the expert at hand. What they hold when the next one begins is never read.
    sums = _map(lambda w: zeros(w.shape[1:], acc), weights)
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)

    def expert(e: Array, carry):
        w = _pick(weights, e)

        def tile(carry, row: Array, rows: int, live: Array | None, opens: bool):
            dx_RD, sums = carry
            take = lambda a: None if a is None else _tiles.take_rows(a, row, rows, live)
            pre = (take(gate_RF), take(up_RF))
            dx_rD, dw = _tile_gradients(activation, take(x_RD), pre, take(dy_RD), w)
            sums = _map(lambda sum, d: _tiles.add_matrix(sum, d, opens), sums, dw)
            return _tiles.put_rows(dx_RD, dx_rD, row, live), sums

        dx_RD, dw, sums = carry
        dx_RD, sums = _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, (dx_RD, sums))
        has_rows = ends_E[e] > starts_E[e]
        return dx_RD, _map(lambda out, sum: _tiles.put_matrix(out, sum, e, has_rows), dw, sums), sums

    dx_RD, dw, _ = jax.lax.fori_loop(jnp.int32(0), jnp.int32(E), expert, (dx_RD, dw, sums))
    return (dx_RD, *dw)


def _tile_gradients(
    activation: str, x_rD: Array, pre: tuple[Array | None, Array], dy_rD: Array, w: _Weights
) -> tuple[Array, _Weights]:
    """dx of one tile, and what the tile adds to the weight gradients."""
    dtype, acc = x_rD.dtype, _checks.accumulator(x_rD.dtype)
    gate_rF, up_rF = _map(lambda z: z.astype(acc), pre)
    dhidden_rF = _dot(dy_rD, w.down_FD, (1, 1))
    gradients = activations.hidden_and_gradients(activation, gate_rF, up_rF, dhidden_rF)
    hidden_rF, dgate_rF, dup_rF = _map(lambda z: z.astype(dtype), gradients)
    dx_rD = _dot(dup_rF, w.up_DF, (1, 1))
    if dgate_rF is not None:
        dx_rD = dx_rD + _dot(dgate_rF, w.gate_DF, (1, 1))
    x_Dr = _tiles.transposed(x_rD)
    return dx_rD, _Weights(_dot(x_Dr, dgate_rF, (1, 0)), _dot(x_Dr, dup_rF, (1, 0)), _dot(hidden_rF, dy_rD, (0, 0)))
