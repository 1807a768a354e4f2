"""What `bench.py kernels` compiles: the shapes, and for each op ours and a public peer.

M rows (tokens times experts per token), K inner, N out, E experts; for the expert layer K is the model's width and N
the experts' hidden size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops

#: WIDE is ours again, with bfloat16 weights.
OURS, PEER, WIDE = "pallas_tpu", "megablox", "bfloat16"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of a released model, or a batch of it."""

    M: int
    K: int
    N: int
    E: int
    experts_per_token: int

    @property
    def tokens(self) -> int:
        return self.M // self.experts_per_token


SHAPES = {
    "olmoe": Shape(65536, 2048, 1024, 64, 8),
    "mixtral": Shape(16384, 4096, 14336, 8, 2),
    "qwen3": Shape(65536, 2048, 768, 128, 8),
    "deepseek_v3": Shape(16384, 7168, 2048, 32, 8),  # the experts that one device of eight holds
    "decode": Shape(64, 2048, 1024, 64, 8),
    "mixtral_decode": Shape(64, 4096, 14336, 8, 2),
}

#: exponent of the load: expert i is drawn in proportion to (i + 1) ** -skew
ROUTINGS = {"multinomial": 0.0, "zipf": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation, whatever the generation."""

    op: str
    implementation: str
    shape: str
    pass_name: str

    def settings(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def cases(op_names: list[str], shapes: list[str], passes: list[str]) -> list[Case]:
    """Ours and the other's of every op, shape and pass that exists."""
    return [
        Case(op, implementation, shape, pass_name)
        for op in op_names
        for shape in shapes
        for pass_name in passes
        for implementation in (OURS, PEER, WIDE)
        if (implementation, pass_name) in BUILDERS[op]
    ]


def build(op: str, implementation: str, shape: str, pass_name: str) -> tuple[Callable, tuple, dict]:
    """(fn, args, meta), as scripts/tpu_sim/profile.py asks for."""
    return BUILDERS[op][implementation, pass_name](SHAPES[shape])


def group_sizes(s: Shape, routing: str) -> np.ndarray:
    """Rows per expert of one draw, always the same."""
    rng = np.random.default_rng(0)
    p = (np.arange(s.E) + 1.0) ** -ROUTINGS[routing]
    return rng.multinomial(s.M, rng.permutation(p / p.sum())).astype(np.int32)


def _array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


# --- grouped_matmul --------------------------------------------------------------------------------------------------


def _matmul_meta(s: Shape, every_expert: bool) -> dict:
    def variant(sizes: np.ndarray) -> dict:
        experts = s.E if every_expert else int((sizes > 0).sum())
        values = s.M * s.K + s.M * s.N + experts * s.K * s.N
        return {"concrete": {2: sizes}, "useful_flops": 2 * s.M * s.K * s.N, "min_bytes": 2 * values}

    return {"variants": {routing: variant(group_sizes(s, routing)) for routing in ROUTINGS}}


def _matmul_arrays(s: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "lhs": _array(s.M, s.K),
        "out": _array(s.M, s.N),
        "rhs": _array(s.E, s.K, s.N),
        "sizes": _array(s.E, dtype=jnp.int32),
    }


_OPERANDS = {"fwd": ("lhs", "rhs", "sizes"), "dlhs": ("out", "rhs", "sizes"), "drhs": ("lhs", "out", "sizes")}


def _matmul_case(function: Callable[[Shape], Callable], pass_name: str) -> Callable[[Shape], tuple]:
    def build(s: Shape) -> tuple:
        arrays = _matmul_arrays(s)
        return function(s), tuple(arrays[n] for n in _OPERANDS[pass_name]), _matmul_meta(s, pass_name == "drhs")

    return build


def _our_forward(s: Shape) -> Callable:
    return lambda lhs, rhs, sizes: ops.grouped_matmul(lhs, rhs, sizes, implementation=OURS)


def _our_dlhs(s: Shape) -> Callable:
    return lambda dout, rhs, sizes: ops.grouped_matmul(dout, rhs, sizes, transpose_rhs=True, implementation=OURS)


def _our_drhs(s: Shape) -> Callable:
    def drhs(lhs, dout, sizes):
        rhs = jnp.zeros((s.E, s.K, s.N), lhs.dtype)  # read by nothing
        forward = lambda rhs: ops.grouped_matmul(lhs, rhs, sizes, implementation=OURS)
        return jax.vjp(forward, rhs)[1](dout)[0]

    return drhs


def _tiles(*dims: int) -> tuple[int, ...]:
    """The usual ones of training."""
    return tuple(min(tile, dim) for tile, dim in zip((512, 1024, 1024), dims))


def _megablox_forward(s: Shape) -> Callable:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiling = _tiles(s.M, s.K, s.N)
    return lambda lhs, rhs, sizes: gmm(lhs, rhs, sizes, preferred_element_type=lhs.dtype, tiling=tiling)


def _megablox_dlhs(s: Shape) -> Callable:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    settings = {"tiling": _tiles(s.M, s.N, s.K), "transpose_rhs": True}
    return lambda dout, rhs, sizes: gmm(dout, rhs, sizes, preferred_element_type=dout.dtype, **settings)


def _megablox_drhs(s: Shape) -> Callable:
    """Its transpose of lhs is left to XLA, and not counted."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tiles(s.M, s.K, s.N)
    return lambda lhs, dout, sizes: tgmm(lhs.T, dout, sizes, preferred_element_type=lhs.dtype, tiling=tiling)


# --- grouped_matmul with 8-bit weights --------------------------------------------------------------------------------


def _narrow_case(dtype: Any, transpose_rhs: bool) -> Callable[[Shape], tuple]:
    """lhs (M, K), or its gradient (M, N) on the way back, times values (E, K, N) with their scale (E, 1, N)."""

    def build(s: Shape) -> tuple:
        def run(lhs, values, scale, sizes):
            rhs = ops.Quantized(values, scale)
            return ops.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs, implementation=OURS)

        def variant(sizes: np.ndarray) -> dict:
            least = 2 * s.M * (s.K + s.N) + int((sizes > 0).sum()) * s.N * (s.K + 4)
            return {"concrete": {3: sizes}, "useful_flops": 2 * s.M * s.K * s.N, "min_bytes": least}

        lhs = _array(s.M, s.N if transpose_rhs else s.K)
        values, scale = _array(s.E, s.K, s.N, dtype=dtype), _array(s.E, 1, s.N, dtype=jnp.float32)
        meta = {"variants": {routing: variant(group_sizes(s, routing)) for routing in ROUTINGS}}
        return run, (lhs, values, scale, _array(s.E, dtype=jnp.int32)), meta

    return build


def _narrow_builders(dtype: Any) -> dict[tuple[str, str], Callable[[Shape], tuple]]:
    return {
        (OURS, "fwd"): _narrow_case(dtype, transpose_rhs=False),
        (OURS, "dlhs"): _narrow_case(dtype, transpose_rhs=True),
        (WIDE, "fwd"): _matmul_case(_our_forward, "fwd"),
        (WIDE, "dlhs"): _matmul_case(_our_dlhs, "dlhs"),
    }


# --- expert_ffn ------------------------------------------------------------------------------------------------------


def _ffn_case(function: Callable[[Shape], Callable]) -> Callable[[Shape], tuple]:
    """x (M, K), gate and up (E, K, N), down (E, N, K). Compulsory: rows in and out, weights of experts at work."""

    def build(s: Shape) -> tuple:
        def variant(sizes: np.ndarray) -> dict:
            values = 2 * s.M * s.K + 3 * int((sizes > 0).sum()) * s.K * s.N
            return {"concrete": {4: sizes}, "useful_flops": 6 * s.M * s.K * s.N, "min_bytes": 2 * values}

        up, down = _array(s.E, s.K, s.N), _array(s.E, s.N, s.K)
        args = (_array(s.M, s.K), up, up, down, _array(s.E, dtype=jnp.int32))
        return function(s), args, {"variants": {r: variant(group_sizes(s, r)) for r in ROUTINGS}}

    return build


def _our_ffn(s: Shape) -> Callable:
    return lambda x, gate, up, down, sizes: ops.expert_ffn(x, gate, up, down, sizes, implementation=OURS)


def _megablox_ffn(s: Shape) -> Callable:
    """Three matmuls; the activation between them is XLA's, and not counted."""
    narrow = dataclasses.replace(s, K=s.N, N=s.K)

    def ffn(x, gate, up, down, sizes):
        matmul = _megablox_forward(s)
        hidden = jax.nn.silu(matmul(x, gate, sizes)) * matmul(x, up, sizes)
        return _megablox_forward(narrow)(hidden, down, sizes)

    return ffn


# --- routed_ffn ------------------------------------------------------------------------------------------------------


def _routed_case(function: Callable[[Shape], Callable]) -> Callable[[Shape], tuple]:
    """x (T, K) and the plan's rows in, (T, K) out. Compulsory: tokens in and out, the plan, weights at work."""

    def build(s: Shape) -> tuple:
        def variant(routing: str) -> dict:
            sizes, (choice, slot) = group_sizes(s, routing), _plan(s, group_sizes(s, routing))
            least = 2 * (2 * s.tokens * s.K + 3 * int((sizes > 0).sum()) * s.K * s.N) + 4 * 3 * s.M
            concrete = {4: sizes, 5: choice, 6: slot}
            return {"concrete": concrete, "useful_flops": 6 * s.M * s.K * s.N, "min_bytes": least}

        ids, choices = lambda *dims: _array(*dims, dtype=jnp.int32), (s.tokens, s.experts_per_token)
        up, down = _array(s.E, s.K, s.N), _array(s.E, s.N, s.K)
        gates = _array(*choices, dtype=jnp.float32)
        args = (_array(s.tokens, s.K), up, up, down, ids(s.E), ids(s.M), ids(*choices), gates)
        return function(s), args, {"variants": {r: variant(r) for r in ROUTINGS}}

    return build


def _narrow_routed(s: Shape) -> tuple:
    """The same with int8 weights, each (values, scale)."""
    _, (x, *weights, sizes, choice, slot, gates), meta = _routed_case(_our_routed)(s)

    def run(x, *operands):
        *narrow, sizes, choice, slot, gates = operands
        weights = (ops.Quantized(*narrow[i : i + 2]) for i in (0, 2, 4))
        return ops.routed_ffn(x, *weights, sizes, choice, slot, gates, implementation=OURS)

    narrow = [_array(*w.shape, dtype=jnp.int8) for w in weights]
    scales = [_array(s.E, 1, w.shape[2], dtype=jnp.float32) for w in weights]
    for variant in meta["variants"].values():
        sizes_E = variant["concrete"][4]
        variant["concrete"] = {i + 3: value for i, value in variant["concrete"].items()}
        variant["min_bytes"] -= int((sizes_E > 0).sum()) * (3 * s.K * s.N - 4 * (2 * s.N + s.K))
    pairs = [array for pair in zip(narrow, scales) for array in pair]
    return run, (x, *pairs, sizes, choice, slot, gates), meta


def _plan(s: Shape, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(choice, slot) with these rows per expert: which token a row belongs to is drawn."""
    choice = np.random.default_rng(1).permutation(s.M).astype(np.int32)
    for end, size in zip(np.cumsum(sizes), sizes):
        choice[end - size : end].sort()  # rows of an expert are in the order of tokens
    return choice, np.argsort(choice).astype(np.int32).reshape(s.tokens, s.experts_per_token)


def _our_routed(s: Shape) -> Callable:
    return functools.partial(ops.routed_ffn, implementation=OURS)


def _megablox_routed(s: Shape) -> Callable:
    """Three matmuls; gather, activation and combine are XLA's, and not counted."""

    def routed(x, gate, up, down, sizes, choice, slot, gates):
        y = _megablox_ffn(s)(x[choice // s.experts_per_token], gate, up, down, sizes)
        return jnp.einsum("tkd,tk->td", y[slot], gates.astype(y.dtype))

    return routed


# --- route_top_k, expert_rows -----------------------------------------------------------------------------------------


def _our_routing(s: Shape) -> tuple:
    """Logits in, ids, gates, positions and counts out, all as their neighbours' layout has them: tokens along lanes.

    Nothing in it depends on the routing.
    """
    T, K = s.tokens, s.experts_per_token

    def route(logits_ET):
        routes = ops.route_top_k(logits_ET.T, K, renormalize=True, implementation=OURS)
        return routes.experts.T, routes.gates.T, routes.positions.T, routes.counts

    meta = {"min_bytes": 4 * (T * s.E + 3 * T * K + s.E)}
    return route, (_array(s.E, T, dtype=jnp.float32),), {"variants": {"multinomial": meta}}


def _our_rows(s: Shape) -> tuple:
    """Ids in, rows and counts out. The ids are read twice: where an expert's rows begin depends on all of them."""
    T, K = s.tokens, s.experts_per_token

    def rows(experts_KT):
        counts, ranks = ops.expert_rows(experts_KT.T, s.E, implementation=OURS)
        return counts, ranks.T

    return rows, (_array(K, T, dtype=jnp.int32),), {"variants": {"multinomial": {"min_bytes": 4 * (2 * T * K + s.E)}}}


# --- low_rank_matmul -------------------------------------------------------------------------------------------------

_RANK = 8


def _our_low_rank(s: Shape) -> tuple:
    """E experts of rank 8 beside a layer, K ids and gates of a token. Compulsory: tokens in and out, factors, choices.

    Nothing in it depends on the routing; useful are the FLOPs of the dense form.
    """
    T, K, L = s.tokens, s.experts_per_token, s.E * _RANK

    def run(x, a, b, gates, ids):
        return ops.low_rank_matmul(x, a, b, gates, ids, form="dense", implementation=OURS)

    args = (_array(T, s.K), _array(s.E, _RANK, s.K), _array(s.E, _RANK, s.N))
    args += (_array(T, K, dtype=jnp.float32), _array(T, K, dtype=jnp.int32))
    meta = {"useful_flops": 2 * T * L * (s.K + s.N), "min_bytes": 2 * (T + L) * (s.K + s.N) + 8 * T * K}
    return run, args, {"variants": {"multinomial": meta}}


# --- the table -------------------------------------------------------------------------------------------------------

#: op -> (implementation, pass) -> builder. Passes: fwd; dlhs and drhs, the gradients of rows and weights.
BUILDERS: dict[str, dict[tuple[str, str], Callable[[Shape], tuple]]] = {
    "grouped_matmul": {
        (OURS, "fwd"): _matmul_case(_our_forward, "fwd"),
        (OURS, "dlhs"): _matmul_case(_our_dlhs, "dlhs"),
        (OURS, "drhs"): _matmul_case(_our_drhs, "drhs"),
        (PEER, "fwd"): _matmul_case(_megablox_forward, "fwd"),
        (PEER, "dlhs"): _matmul_case(_megablox_dlhs, "dlhs"),
        (PEER, "drhs"): _matmul_case(_megablox_drhs, "drhs"),
    },
    "grouped_matmul_int8": _narrow_builders(jnp.int8),
    "grouped_matmul_fp8": _narrow_builders(jnp.float8_e4m3fn),
    "expert_ffn": {(OURS, "fwd"): _ffn_case(_our_ffn), (PEER, "fwd"): _ffn_case(_megablox_ffn)},
    "routed_ffn": {(OURS, "fwd"): _routed_case(_our_routed), (PEER, "fwd"): _routed_case(_megablox_routed)},
    "routed_ffn_int8": {(OURS, "fwd"): _narrow_routed, (WIDE, "fwd"): _routed_case(_our_routed)},
    "route_top_k": {(OURS, "fwd"): _our_routing},
    "expert_rows": {(OURS, "fwd"): _our_rows},
    "low_rank_matmul": {(OURS, "fwd"): _our_low_rank},
}
PASSES = ("fwd", "dlhs", "drhs")
