"""GPU kernel (Pallas, Triton) that sums each token's rows: one launch, each row read once, each token written once.

A program has a few tokens and a tile of columns. It reads the slots and gates of its tokens, loads the rows of one
choice after the other and adds them up in registers. No scatter, no (T, K, D) array. Dims as in api.py; W tokens of a
program, C columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

Ref = Any
#: Sums of a program, at most, and columns: a warp loads whole lines of memory.
_SUMS, _COLS, _WARPS = 2048, 512, 4


def sum_choices(y_RD: Array, slot_TK: Array, gates_TK: Array | None, *, interpret: bool = False) -> Array:
    """sum over k of y[slot[:, k]], weighted: (T, D) in y's dtype, summed in float32.

    Slots of R and above contribute nothing; gates of such choices are not read.
    """
    return _sum_choices(y_RD, slot_TK.astype(jnp.int32), gates_TK, interpret=interpret)


# Jitted for the cache: layers of one shape are traced once.
@functools.partial(jax.jit, static_argnames="interpret")
def _sum_choices(y_RD, slot_TK, gates_TK, *, interpret):
    D, T = y_RD.shape[1], slot_TK.shape[0]
    cols = min(1 << max(D - 1, 0).bit_length(), _COLS)
    tokens, columns = _SUMS // cols, -(-D // cols)
    operands, tree = jax.tree.flatten((y_RD, slot_TK, gates_TK))
    return pl.pallas_call(
        functools.partial(_kernel, tree, tokens, cols),
        out_shape=jax.ShapeDtypeStruct((T, D), y_RD.dtype, manual_axis_type=jax.typeof(y_RD).manual_axis_type),
        grid=(-(-T // tokens), columns),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="sum_choices",
    )(*operands)


def _kernel(tree: Any, tokens: int, cols: int, *refs: Ref) -> None:
    (y, slot, gates), out = jax.tree.unflatten(tree, refs[:-1]), refs[-1]
    (T, D), R, K = out.shape, y.shape[0], slot.shape[1]
    token_W, col_C = pl.program_id(0) * tokens + _iota(tokens), pl.program_id(1) * cols + _iota(cols)
    there_W, there_C = token_W < T, col_C < D
    mask_WC = there_W[:, None] & there_C[None, :]
    total_WC = jnp.zeros((tokens, cols), jnp.float32)
    for k in range(K):
        choice_W = (token_W, jnp.full_like(token_W, k))
        row_W = plgpu.load(slot.at[choice_W], mask=there_W, other=R)
        live_W = row_W < R
        at = y.at[jnp.minimum(row_W, R - 1)[:, None], jnp.minimum(col_C, D - 1)[None, :]]
        row_WC = plgpu.load(at, mask=mask_WC & live_W[:, None], other=0).astype(jnp.float32)
        if gates is not None:
            row_WC *= plgpu.load(gates.at[choice_W], mask=live_W, other=0).astype(jnp.float32)[:, None]
        total_WC += row_WC
    plgpu.store(out.at[token_W[:, None], col_C[None, :]], total_WC.astype(out.dtype), mask=mask_WC)


def _iota(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
