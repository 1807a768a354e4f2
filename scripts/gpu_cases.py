"""What `bench.py kernels --gpu-static` compiles and `--gpu` times: per op and pass, a function of an implementation.

Shapes and routings are those of the TPU's cases (kernel_cases.py); dims as there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
from kernel_cases import SHAPES, Shape

import pallas_kernels as ops
from moe_zoo.core.sight import Sight
from moe_zoo.layers.attend import attend_causally

#: What the ops can be asked for here.
IMPLEMENTATIONS = ("pallas_gpu", "mosaic_gpu", "xla")
#: Those with Mosaic kernels.
MOSAIC_OPS = ("grouped_matmul", "expert_ffn")
PASSES = ("fwd", "dlhs", "drhs", "bwd")


@dataclasses.dataclass(frozen=True)
class Work:
    """One program: `function(implementation)` of `args`, shapes; `sizes` says which of them are the group sizes.

    flops: what is useful of it. plan: whether the last of the args are a routing plan (choice, slot).
    """

    function: Callable[[str], Callable[..., Any]]
    args: tuple[jax.ShapeDtypeStruct, ...]
    sizes: int | None
    flops: int
    plan: bool = False


def _array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def _ids(*dims: int) -> jax.ShapeDtypeStruct:
    return _array(*dims, dtype=jnp.int32)


# --- grouped_matmul --------------------------------------------------------------------------------------------------


def _matmul(s: Shape, transpose_rhs: bool) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        return functools.partial(ops.grouped_matmul, transpose_rhs=transpose_rhs, implementation=implementation)

    rows = _array(s.M, s.N if transpose_rhs else s.K)
    return Work(function, (rows, _array(s.E, s.K, s.N), _ids(s.E)), 2, 2 * s.M * s.K * s.N)


def _drhs(s: Shape) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        def drhs(lhs, dout, sizes):
            rhs = jnp.zeros((s.E, s.K, s.N), lhs.dtype)  # read by nothing
            forward = lambda rhs: ops.grouped_matmul(lhs, rhs, sizes, implementation=implementation)
            return jax.vjp(forward, rhs)[1](dout)[0]

        return drhs

    return Work(function, (_array(s.M, s.K), _array(s.M, s.N), _ids(s.E)), 2, 2 * s.M * s.K * s.N)


def _narrow(dtype: Any, s: Shape) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        def matmul(lhs, values, scale, sizes):
            return ops.grouped_matmul(lhs, ops.Quantized(values, scale), sizes, implementation=implementation)

        return matmul

    weights = (_array(s.E, s.K, s.N, dtype=dtype), _array(s.E, 1, s.N, dtype=jnp.float32))
    return Work(function, (_array(s.M, s.K), *weights, _ids(s.E)), 3, 2 * s.M * s.K * s.N)


# --- the expert layer ------------------------------------------------------------------------------------------------


def pullback(forward: Callable[..., Any], count: int) -> Callable[..., Any]:
    """(value, gradients of the first `count` arguments) of `forward(*args)`, given the output's gradient first."""

    def run(dout, *args):
        out, pullback = jax.vjp(lambda *floats: forward(*floats, *args[count:]), *args[:count])
        return out, pullback(dout)

    return run


def _weights(s: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    return _array(s.E, s.K, s.N), _array(s.E, s.K, s.N), _array(s.E, s.N, s.K)


def _ffn(s: Shape, backward: bool) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        forward = functools.partial(ops.expert_ffn, implementation=implementation)
        return pullback(forward, 4) if backward else forward

    rows, flops = _array(s.M, s.K), 6 * s.M * s.K * s.N
    args = (rows, *_weights(s), _ids(s.E))
    return Work(function, (rows, *args), 5, 3 * flops) if backward else Work(function, args, 4, flops)


def _routed(s: Shape, backward: bool) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        def forward(x, gate, up, down, gates, sizes, choice, slot):
            return ops.routed_ffn(x, gate, up, down, sizes, choice, slot, gates, implementation=implementation)

        return pullback(forward, 5) if backward else forward

    tokens, choices, flops = _array(s.tokens, s.K), (s.tokens, s.experts_per_token), 6 * s.M * s.K * s.N
    args = (tokens, *_weights(s), _array(*choices, dtype=jnp.float32), _ids(s.E), _ids(s.M), _ids(*choices))
    return Work(function, (tokens, *args), 6, 3 * flops, True) if backward else Work(function, args, 5, flops, True)


def _route(s: Shape) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        route = functools.partial(ops.route_top_k, k=s.experts_per_token, renormalize=True)
        return lambda logits: route(logits, implementation=implementation)[:4]

    return Work(function, (_array(s.tokens, s.E, dtype=jnp.float32),), None, 0)


# --- attention -------------------------------------------------------------------------------------------------------

#: tokens of a row, and numbers of a head
_ROW, _HEAD = 2048, 128


def _attention(s: Shape, backward: bool) -> Work:
    """Rows of one document; "xla" goes through blocks of queries."""
    rows, heads = max(1, s.tokens // _ROW), s.K // _HEAD

    def function(implementation: str) -> Callable[..., Any]:
        def forward(q, k, v):
            places = jnp.tile(jnp.arange(_ROW, dtype=jnp.int32), (rows, 1))
            named = implementation if implementation in IMPLEMENTATIONS else "xla"
            return attend_causally(q, k, v, None, Sight(places, places), None, None, named)

        return pullback(forward, 3) if backward else forward

    array = _array(rows, heads, _ROW, _HEAD)
    flops = 2 * rows * heads * _ROW * (_ROW + 1) * _HEAD
    return Work(function, (array,) * (4 if backward else 3), None, flops * (3 if backward else 1))


def _rows(s: Shape) -> Work:
    def function(implementation: str) -> Callable[..., Any]:
        return functools.partial(ops.expert_rows, num_experts=s.E, implementation=implementation)

    return Work(function, (_ids(s.tokens, s.experts_per_token),), None, 0)


def _low_rank(s: Shape, backward: bool) -> Work:
    """Experts of rank 8 beside a layer of this shape, each token's own."""

    def function(implementation: str) -> Callable[..., Any]:
        def forward(x, a, b, gates, ids):
            return ops.low_rank_matmul(x, a, b, gates, ids, form="grouped", implementation=implementation)

        return pullback(forward, 4) if backward else forward

    rank, choices = 8, (s.tokens, s.experts_per_token)
    args = (_array(s.tokens, s.K), _array(s.E, rank, s.K), _array(s.E, rank, s.N), _array(*choices, dtype=jnp.float32))
    args, flops = (*args, _ids(*choices)), 2 * s.M * rank * (s.K + s.N)
    return (
        Work(function, (_array(s.tokens, s.N), *args), None, 3 * flops)
        if backward
        else Work(function, args, None, flops)
    )


#: (op, pass) -> work at a shape
WORKS: dict[tuple[str, str], Callable[[Shape], Work]] = {
    ("grouped_matmul", "fwd"): functools.partial(_matmul, transpose_rhs=False),
    ("grouped_matmul", "dlhs"): functools.partial(_matmul, transpose_rhs=True),
    ("grouped_matmul", "drhs"): _drhs,
    ("grouped_matmul_int8", "fwd"): functools.partial(_narrow, jnp.int8),
    ("grouped_matmul_fp8", "fwd"): functools.partial(_narrow, jnp.float8_e4m3fn),
    ("expert_ffn", "fwd"): functools.partial(_ffn, backward=False),
    ("expert_ffn", "bwd"): functools.partial(_ffn, backward=True),
    ("routed_ffn", "fwd"): functools.partial(_routed, backward=False),
    ("routed_ffn", "bwd"): functools.partial(_routed, backward=True),
    ("route_top_k", "fwd"): _route,
    ("causal_attention", "fwd"): functools.partial(_attention, backward=False),
    ("causal_attention", "bwd"): functools.partial(_attention, backward=True),
    ("expert_rows", "fwd"): _rows,
    ("low_rank_grouped", "fwd"): functools.partial(_low_rank, backward=False),
    ("low_rank_grouped", "bwd"): functools.partial(_low_rank, backward=True),
}
OPS = tuple(dict.fromkeys(op for op, _ in WORKS))


@dataclasses.dataclass(frozen=True)
class Case:
    """One program at one shape."""

    op: str
    pass_name: str
    shape: str

    def work(self) -> Work:
        return WORKS[self.op, self.pass_name](SHAPES[self.shape])


def cases(op_names: list[str], shapes: list[str], passes: list[str]) -> list[Case]:
    """Those of these names that exist."""
    return [
        Case(op, pass_name, shape)
        for (op, pass_name) in WORKS
        for shape in shapes
        if op in op_names and pass_name in passes
        if op != "causal_attention" or SHAPES[shape].tokens >= _ROW
    ]


def operands(case: Case, routing: str, seed: int = 0) -> list[Any]:
    """Concrete arrays for `case`: normal ones scaled by the root of the summed dim, sizes of a drawn routing."""
    shape, work, rng = SHAPES[case.shape], case.work(), np.random.default_rng(seed)
    sizes = kernel_cases.group_sizes(shape, routing)
    given = [_drawn(rng, a) for a in work.args]
    if work.sizes is not None:
        given[work.sizes] = sizes
    if case.op in ("expert_rows", "low_rank_grouped"):  # ids, some of no expert
        given[-1] = rng.integers(0, shape.E + 1, work.args[-1].shape)
    if work.plan:
        given[-2:] = kernel_cases._plan(shape, sizes)
    return [jnp.asarray(a, like.dtype) for a, like in zip(given, work.args)]


def _drawn(rng: np.random.Generator, like: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(like.dtype, jnp.integer) and like.dtype != jnp.int8:
        return np.zeros(like.shape, np.int32)
    if like.dtype == jnp.int8:
        return rng.integers(-127, 128, like.shape, np.int8)
    return rng.standard_normal(like.shape, np.float32) / np.sqrt(like.shape[-2] if len(like.shape) == 3 else 1)
