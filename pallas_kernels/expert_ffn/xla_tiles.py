"""The expert network as one fused loop over experts and row tiles, for CPUs.

Dims as in api.py; r rows of a tile, H the columns of gate and up side by side (2F, or F without a gate).
Per expert the weights are sliced once; per tile the hidden layer never leaves the cache. Gate and up are one dot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _checks, _groups, _tiles, _varying
from pallas_kernels.expert_ffn import activations


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_checks.accumulator(a.dtype))


def _expert_weights(e: Array, w_gate_EDF: Array | None, w_up_EDF: Array, w_down_EFD: Array) -> tuple[Array, Array]:
    """(D, H) and (F, D) of expert e."""
    pick = lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False)
    w_in_DH = pick(w_up_EDF) if w_gate_EDF is None else jnp.concatenate([pick(w_gate_EDF), pick(w_up_EDF)], axis=1)
    return w_in_DH, pick(w_down_EFD)


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
    zeros_RF = lambda: _varying.zeros_like_varying((R, F), x_RD.dtype, x_RD)
    y_RD = _varying.zeros_like_varying(x_RD.shape, x_RD.dtype, x_RD)
    gate_RF = zeros_RF() if save and w_gate_EDF is not None else None
    up_RF = zeros_RF() if save else None
    if R == 0:
        return y_RD, gate_RF, up_RF
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)

    def expert(e: Array, out):
        w_in_DH, w_out_FD = _expert_weights(e, w_gate_EDF, w_up_EDF, w_down_EFD)

        def tile(out, row: Array, rows: int, live: Array | None):
            y_RD, gate_RF, up_RF = out
            pre_rH = _dot(_tiles.take_rows(x_RD, row, rows), w_in_DH, (1, 0))
            gate_rF, up_rF = (None, pre_rH) if w_gate_EDF is None else (pre_rH[:, :F], pre_rH[:, F:])
            hidden_rF = activations.hidden(activation, gate_rF, up_rF).astype(x_RD.dtype)
            put = lambda out, tile: None if out is None else _tiles.put_rows(out, tile, row, live)
            return put(y_RD, _dot(hidden_rF, w_out_FD, (1, 0))), put(gate_RF, gate_rF), put(up_RF, up_rF)

        return _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, out)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(E), expert, (y_RD, gate_RF, up_RF))


class _Gradients(NamedTuple):
    """Carried over the experts."""

    dx_RD: Array
    dw_gate_EDF: Array | None
    dw_up_EDF: Array
    dw_down_EFD: Array


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
    (R, D), (E, _, F), acc = x_RD.shape, w_up_EDF.shape, _checks.accumulator(x_RD.dtype)
    zeros = lambda shape, dtype: _varying.zeros_like_varying(shape, dtype, x_RD)
    zeros_like = lambda w: None if w is None else zeros(w.shape, w.dtype)
    out = _Gradients(*(zeros_like(a) for a in (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)))
    if R == 0:
        return tuple(out)
    starts_E, ends_E = _groups.group_bounds(sizes_L, offset, E, R)
    sizes = _tiles.tile_sizes(R, E)
    H = F if w_gate_EDF is None else 2 * F

    def expert(e: Array, out: _Gradients) -> _Gradients:
        w_in_DH, w_out_FD = _expert_weights(e, w_gate_EDF, w_up_EDF, w_down_EFD)

        def tile(sums, row: Array, rows: int, live: Array | None):
            dx_RD, dw_in_DH, dw_out_FD = sums
            take = lambda x: None if x is None else _tiles.take_rows(x, row, rows, live)
            x_rD, dy_rD = take(x_RD), take(dy_RD)
            hidden_rF, dpre_rH = _tile_gradients(activation, take(gate_RF), take(up_RF), dy_rD, w_out_FD)
            dx_RD = _tiles.put_rows(dx_RD, _dot(dpre_rH, w_in_DH, (1, 1)), row, live)
            return dx_RD, dw_in_DH + _dot(x_rD, dpre_rH, (0, 0)), dw_out_FD + _dot(hidden_rF, dy_rD, (0, 0))

        sums = (out.dx_RD, zeros((D, H), acc), zeros((F, D), acc))
        dx_RD, dw_in_DH, dw_out_FD = _tiles.for_each_tile(starts_E[e], ends_E[e], R, sizes, tile, sums)
        put = lambda out, w: None if out is None else jax.lax.dynamic_update_index_in_dim(out, w.astype(out.dtype), e, 0)
        dw_gate_DF, dw_up_DF = (None, dw_in_DH) if w_gate_EDF is None else (dw_in_DH[:, :F], dw_in_DH[:, F:])
        return _Gradients(
            dx_RD, put(out.dw_gate_EDF, dw_gate_DF), put(out.dw_up_EDF, dw_up_DF), put(out.dw_down_EFD, dw_out_FD)
        )

    return tuple(jax.lax.fori_loop(jnp.int32(0), jnp.int32(E), expert, out))


def _tile_gradients(
    activation: str, gate_rF: Array | None, up_rF: Array, dy_rD: Array, w_out_FD: Array
) -> tuple[Array, Array]:
    """Hidden layer (r, F) and the gradient of the pre-activations (r, H) of one tile."""
    acc = _checks.accumulator(dy_rD.dtype)
    wide = lambda z: None if z is None else z.astype(acc)
    dhidden_rF = _dot(dy_rD, w_out_FD, (1, 1))
    hidden_rF, dgate_rF, dup_rF = activations.hidden_and_gradients(activation, wide(gate_rF), wide(up_rF), dhidden_rF)
    dpre_rH = dup_rF if dgate_rF is None else jnp.concatenate([dgate_rF, dup_rF], axis=1)
    return hidden_rF.astype(dy_rD.dtype), dpre_rH.astype(dy_rD.dtype)
