"""TPU kernel that sums each token's rows: single-row copies by slot, a weighted sum in float32, one write per token.

No scatter, no (T, K, D) array. Two halves of a step take turns: while the rows of one are summed, copies of the rows of
the other are started between the instructions. Each half has a buffer of its own, so that the compiler may mix them.
Dims as in api.py; rows come packed (_tpu_rows.pack_rows).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import _tpu_target

#: Tokens summed in one straight run of code: a whole tile of 16-bit numbers.
_GROUP = 16
_HALF = 4 * _GROUP
_BUFFER_BYTES = 8 * 2**20
#: Slots lie in scalar memory, of which the smallest generation has 1 MiB.
MAX_CHOICES = 2**17


def sum_choices(
    words_R1W: Array, slot_TK: Array, gates_TK: Array | None, *, block: int, dtype: Any, interpret: bool
) -> Array:
    """sum over k of y[slot[:, k]], weighted: (T, D) in `dtype`, for y packed in blocks of `block` columns."""
    gates_TK = jnp.ones(slot_TK.shape, jnp.float32) if gates_TK is None else gates_TK.astype(jnp.float32)
    return _sum_choices(words_R1W, slot_TK, gates_TK, block=block, dtype=jnp.dtype(dtype), interpret=interpret)


@functools.partial(jax.jit, static_argnames=("block", "dtype", "interpret"))
def _sum_choices(words_R1W, slot_TK, gates_TK, *, block, dtype, interpret):
    (R, _, W), (T, K) = words_R1W.shape, slot_TK.shape
    D = W if dtype.itemsize == 4 else 2 * W
    half = _HALF
    while half > _GROUP and half * K * W * 4 > _BUFFER_BYTES:
        half //= 2
    fill = -T % (2 * half)
    slot_TK = jnp.pad(slot_TK.astype(jnp.int32), ((0, fill), (0, 0)), constant_values=R)
    gates_TK = jnp.pad(gates_TK, ((0, fill), (0, 0)))
    tokens = lambda width: pl.BlockSpec((2 * half, width), lambda i, _: (i, 0))
    buffer = pltpu.VMEM((K, half // 8, 8, W), words_R1W.dtype)
    varying = jax.typeof(words_R1W).manual_axis_type
    out_TD = pl.pallas_call(
        functools.partial(_kernel, R, half, block),
        out_shape=jax.ShapeDtypeStruct((T + fill, D), dtype, manual_axis_type=varying),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=((T + fill) // (2 * half),),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), tokens(K), tokens(K)],
            out_specs=tokens(D),
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,))],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=_tpu_target.current().vmem_bytes // 2,
        ),
        cost_estimate=pl.CostEstimate(flops=2 * T * K * D, transcendentals=0, bytes_accessed=4 * W * T * (K + 1)),
        name="combine_rows",
        interpret=pltpu.InterpretParams() if interpret else False,
    )(jnp.minimum(slot_TK, R - 1).reshape(-1), words_R1W, slot_TK, gates_TK)
    return out_TD[:T] if fill else out_TD


def _kernel(R: int, half: int, block: int, row, y, slot, gates, out, buffer0, buffer1, sem) -> None:
    step, steps = pl.program_id(0), pl.num_programs(0)
    buffers = (buffer0, buffer1)

    @pl.when(step == 0)
    def _():
        jax.lax.fori_loop(0, half // _GROUP, lambda g, _: _start(row, y, buffers[0], sem.at[0], 0, g, True), 0)

    for h in range(2):
        now, then = buffers[h], buffers[1 - h]
        pltpu.make_async_copy(now, now, sem.at[h]).wait()
        first = (2 * step + h + 1) * half  # the first token of the next half
        exists = (step + 1 < steps) | (h == 0)

        def group(g, _, h=h, now=now, then=then, first=first, exists=exists):
            _start(row, y, then, sem.at[1 - h], first, g, exists)
            at = pl.ds(pl.multiple_of(h * half + g * _GROUP, _GROUP), _GROUP)
            _sum(R, block, now.at[:, pl.ds(g * (_GROUP // 8), _GROUP // 8)], slot.at[at], gates.at[at], out.at[at])
            return 0

        jax.lax.fori_loop(0, half // _GROUP, group, 0)


def _start(row, y, buffer, sem, first, g, exists) -> int:
    """Starts the copies of a group's rows: group g of the half that begins at token `first`."""
    K = buffer.shape[0]
    at = (first + g * _GROUP) * K
    for i in range(_GROUP):
        for k in range(K):

            @pl.when(exists)
            def _(i=i, k=k):
                dst = buffer.at[k, g * (_GROUP // 8) + i // 8, pl.ds(i % 8, 1), :]
                pltpu.make_async_copy(y.at[row[at + i * K + k]], dst, sem).start()

    return 0


def _sum(R: int, block: int, rows, slot, gates, out) -> None:
    """The weighted sum over k of a group's rows; a block of words at a time, so that sums stay in registers."""
    K, W = rows.shape[0], rows.shape[-1]
    packed = rows.dtype == jnp.int32
    width = block // 2 if packed else W
    for first in range(0, W, width):
        totals = [0.0, 0.0] if packed else [0.0]
        for k in range(K):
            words = rows[k, :, :, first : first + width].reshape(_GROUP, width)
            # A dropped choice has fetched some other row: it is selected away, whatever it holds.
            words = jnp.where(slot[:, k : k + 1] < R, words, 0)
            gate = jnp.where(slot[:, k : k + 1] < R, gates[:, k : k + 1], 0)
            for p, part in enumerate(_parts(words)):
                totals[p] += gate * part
        for p, total in enumerate(totals):
            at = first * len(totals) + p * width
            out[:, at : at + width] = total.astype(out.dtype)


def _parts(words) -> tuple[Array, ...]:
    """float32 of the numbers in the words: see _tpu_rows.pack_rows."""
    if words.dtype == jnp.float32:
        return (words,)
    wide = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    return wide(words << 16), wide(words & jnp.int32(-65536))
