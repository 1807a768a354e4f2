"""Measures ops side by side, as ratios within one run.

    python scripts/bench.py expert_ffn --num_experts 8 64

Timings of shared machines move; contenders are therefore run in turn, round after round, and compared by the lower
quartile of their CPU seconds and of their wall seconds. `kernels` (bench_kernels.py) simulates and needs no such care.
To add a benchmark: write `add_<name>(subparsers)`, whose parser sets `run` to a function of the parsed arguments, and
list it in `BENCHMARKS`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import bench_depth
import bench_generate
import bench_loading
import bench_low_rank
import bench_train
import jax
import jax.numpy as jnp
import numpy as np
from bench_big_small import add_big_small
from bench_kernels import add_kernels
from bench_norms import add_norms
from bench_routers import add_routers
from measuring import compare, print_table

from moe_zoo.cli import allocator
from pallas_kernels import expert_ffn, expert_positions, expert_rows, grouped_matmul

# --- expert_ffn ------------------------------------------------------------------------------------------------------


def _dense_ffn(x_RD, w_gate_DF, w_up_DF, w_down_FD):
    return (jax.nn.silu(x_RD @ w_gate_DF) * (x_RD @ w_up_DF)) @ w_down_FD


def _three_matmuls(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E):
    gate_RF, up_RF = grouped_matmul(x_RD, w_gate_EDF, sizes_E), grouped_matmul(x_RD, w_up_EDF, sizes_E)
    return grouped_matmul(jax.nn.silu(gate_RF) * up_RF, w_down_EFD, sizes_E)


def _forward_backward(ffn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Jitted (y, gradients of x and of the three weights) for a given output gradient."""

    def run(dy_RD, x_RD, w_gate, w_up, w_down, *rest):
        y_RD, pullback = jax.vjp(lambda *floats: ffn(*floats, *rest), x_RD, w_gate, w_up, w_down)
        return y_RD, pullback(dy_RD)

    return jax.jit(run)


def _routed_sizes(rng: np.random.Generator, rows: int, num_experts: int, skew: float) -> np.ndarray:
    """Multinomial group sizes; expert i is drawn in proportion to (i + 1) ** -skew (0: uniform, 1: Zipf)."""
    p = (np.arange(num_experts) + 1.0) ** -skew
    return rng.multinomial(rows, rng.permutation(p / p.sum())).astype(np.int32)


def _draw(rng: np.random.Generator, dtype: str, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)


def _bench_expert_ffn(args: argparse.Namespace) -> None:
    allocator.use()  # as training runs
    rng = np.random.default_rng(args.seed)
    draw = functools.partial(_draw, rng, args.dtype)
    R, D, F = args.rows, args.d_model, args.d_ff
    x_RD, dy_RD = draw(R, D), draw(R, D)
    baseline = "dense, same FLOPs"
    fused = lambda name: functools.partial(expert_ffn, implementation=name)
    ffns = {"expert_ffn": fused(None), "three grouped_matmuls": _three_matmuls}
    if not args.no_ragged_dot:
        ffns["ragged_dot"] = fused("xla")
    dense = (dy_RD, x_RD, draw(D, F), draw(D, F), draw(F, D))
    contenders = {baseline: functools.partial(_forward_backward(_dense_ffn), *dense)}
    for E in args.num_experts:
        sizes_E = jnp.asarray(_routed_sizes(rng, R, E, args.skew))
        routed = (dy_RD, x_RD, draw(E, D, F), draw(E, D, F), draw(E, F, D), sizes_E)
        for name, ffn in ffns.items():
            contenders[f"{name}, E {E}"] = functools.partial(_forward_backward(ffn), *routed)
    timings = compare(contenders, args.rounds, args.repeats)
    title = f"forward + backward, rows {R}, D {D}, F {F}, {args.dtype}, skew {args.skew:g}"
    print_table(title, timings, baseline, gflop=18 * R * D * F / 1e9)


def add_expert_ffn(subparsers: Any) -> None:
    """The fused expert layer beside a dense one, grouped matmuls in a row, and ragged_dot."""
    parser = subparsers.add_parser("expert_ffn", help="one SwiGLU expert layer, forward and backward")
    parser.add_argument("--rows", type=int, default=4096, help="tokens times experts per token")
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--d_ff", type=int, default=512)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--skew", type=float, default=0.0, help="exponent of the load: 0 uniform, 1 Zipf")
    parser.add_argument("--no_ragged_dot", action="store_true", help="leave out the slowest contender")
    _add_common(parser, _bench_expert_ffn)


# --- expert_rows -----------------------------------------------------------------------------------------------------


def _rows_by_sorting(experts_TK, num_experts):
    """One packed int32 key per choice: sorting one operand is cheaper than a key and a payload."""
    N, ids_N = experts_TK.size, experts_TK.reshape(-1)
    choice_N = jnp.arange(N, dtype=jnp.int32)
    order_N = jax.lax.sort(ids_N * N + choice_N, is_stable=False) % N
    row_N = jnp.zeros(N, jnp.int32).at[order_N].set(choice_N, unique_indices=True)
    return (ids_N[:, None] == jnp.arange(num_experts)).sum(0), row_N.reshape(experts_TK.shape)


def _positions_by_cumsum(experts_TK, num_experts):
    """Running one-hot sums over all choices, first choices first."""
    ids_N = experts_TK.T.reshape(-1)
    onehot_NE = (ids_N[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    earlier_N = ((jnp.cumsum(onehot_NE, axis=0) - onehot_NE) * onehot_NE).sum(1)
    return onehot_NE.sum(0), earlier_N.reshape(experts_TK.shape[::-1]).T


def _bench_expert_rows(args: argparse.Namespace) -> None:
    T, K = args.tokens, args.k
    for E in args.num_experts:
        rng = np.random.default_rng(args.seed)
        experts_TK = jnp.asarray(rng.random((T, E)).argsort(axis=1)[:, :K], jnp.int32)
        by_choice = functools.partial(expert_positions, priority="choice")
        functions = {
            "sort": _rows_by_sorting,
            "expert_rows": expert_rows,
            "cumsum of one-hot": _positions_by_cumsum,
            "expert_positions": by_choice,
        }
        contenders = {n: functools.partial(jax.jit(f, static_argnums=1), experts_TK, E) for n, f in functions.items()}
        timings = compare(contenders, args.rounds, args.repeats)
        print_table(f"places of {T} x {K} choices of {E} experts", timings, "sort")


def add_expert_rows(subparsers: Any) -> None:
    """Places of choices among their expert's rows: by sorting or running sums, and by counting in blocks."""
    parser = subparsers.add_parser("expert_rows", help="places of choices among their expert's rows")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--k", type=int, default=8, help="experts per token")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[8, 64, 128])
    _add_common(parser, _bench_expert_rows)


# --- command line ----------------------------------------------------------------------------------------------------


def _add_common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2, help="calls per round")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


BENCHMARKS = (
    add_big_small, add_expert_ffn, add_expert_rows, add_kernels, add_norms, add_routers, bench_depth.add_depth,
    bench_generate.add_generate, bench_loading.add_loading, bench_low_rank.add_low_rank, bench_train.add_train,
    bench_train.add_startup,
)  # fmt: skip


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    for add in BENCHMARKS:
        add(subparsers)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
