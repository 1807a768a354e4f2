"""Rows of given choices, sorted by expert, by a Pallas GPU kernel (Triton) without a sort.

A program numbers one block of choices, W at a time, and carries on how many of them each expert has. What the blocks
before it hold is a small array, which XLA sums up and adds. Dims as in api.py; N = T K choices, B blocks, P experts
filled up to a power of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import _gpu_target
from pallas_kernels.route_top_k import pallas_gpu, xla

#: Steps of a program: more make the array of the blocks smaller, and leave fewer programs.
_STEPS, _WARPS, _MOST_AT_ONCE = 8, 4, 128


def refusal(shape: tuple[int, int], num_experts: int, asked: str | None) -> str | None:
    """Why the kernel cannot run this; None if it can."""
    if 0 in shape:
        return "there is no choice"
    if num_experts > pallas_gpu.MOST_EXPERTS:
        return f"it counts the choices of at most {pallas_gpu.MOST_EXPERTS} experts at once"
    if asked is None and _gpu_target.current() is None:
        return "this is not traced for an NVIDIA GPU"
    return None


def rows(experts_TK: Array, *, num_experts: int, interpret: bool = False) -> tuple[Array, Array]:
    """(choices per expert, rank of each choice when sorted by expert)."""
    N, E = experts_TK.size, num_experts
    at_once = min(max(pallas_gpu.BLOCK_SCORES // pallas_gpu.power_above(E), 1), _MOST_AT_ONCE)
    block = at_once * _STEPS
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(experts_TK).manual_axis_type)
    ids_N = experts_TK.astype(jnp.int32).reshape(N)
    places_N, counts_BE = pl.pallas_call(
        functools.partial(_kernel, at_once, E),
        out_shape=[like((N,), jnp.int32), like((-(-N // block), E), jnp.int32)],
        grid=(-(-N // block),),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="expert_rows",
    )(ids_N)
    counts_E, starts_BE = xla.starts(counts_BE, from_expert_start=True)
    block_N = jax.lax.broadcasted_iota(jnp.int32, (N,), 0) // block
    rows_N = places_N + starts_BE[block_N, jnp.minimum(ids_N, E - 1)]
    return counts_E, jnp.where(ids_N < E, rows_N, N).reshape(experts_TK.shape)


def _kernel(at_once: int, E: int, ids, places, counts) -> None:
    (N,), block = ids.shape, pl.program_id(0)
    iota = lambda size: jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    expert_P = iota(pallas_gpu.power_above(E))

    def step(i: Array, before_P: Array) -> Array:
        choice_W = (block * _STEPS + i) * at_once + iota(at_once)
        id_W = plgpu.load(ids.at[jnp.minimum(choice_W, N - 1)])
        hit_WP = (id_W[:, None] == expert_P[None, :]) & (choice_W < N)[:, None]
        one_WP = hit_WP.astype(jnp.int32)
        earlier_WP = jax.lax.cumsum(one_WP, axis=0) - one_WP + before_P[None, :]
        place_W = jnp.sum(jnp.where(hit_WP, earlier_WP, 0), axis=1, dtype=jnp.int32)
        plgpu.store(places.at[choice_W], place_W, mask=choice_W < N)
        return before_P + jnp.sum(one_WP, axis=0, dtype=jnp.int32)

    count_P = jax.lax.fori_loop(0, _STEPS, step, jnp.zeros(expert_P.shape, jnp.int32))
    plgpu.store(counts.at[jnp.broadcast_to(block, expert_P.shape), expert_P], count_P, mask=expert_P < E)
