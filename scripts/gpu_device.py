"""`bench.py kernels --gpu`: the GPU kernels on the GPU at hand, checked and timed beside what else there is.

    python scripts/bench.py kernels --gpu

Rows, device, versions and command go to docs/results/kernels_gpu.json (or --json).

Checked against a float32 loop over row tiles ("xla_tiles") on the same operands. Timed, in medians of device time
(CUPTI's, or torch's events; wall time of many calls where CUPTI is not to be had, and the table says so), beside
`jax.lax.ragged_dot`, tokamax and `torch._grouped_mm` where they are installed, and one dense matmul of the same FLOPs.
Exit code 1 if a result is wrong; the bars (at least the best peer's speed everywhere, 1.3 times in geometric mean, 70%
of the dense rate at OLMoE and Mixtral) are printed with their verdict.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import Case
from kernel_cases import SHAPES

#: MOSAIC is ours, too, for one generation of devices, and not what None takes: timed and checked, but no peer.
OURS, MOSAIC, DENSE = "pallas_gpu", "mosaic_gpu", "dense, same FLOPs"
_RESULTS = Path(__file__).parents[1] / "docs" / "results" / "kernels_gpu.json"
#: Largest difference from float32, over the largest value.
_TOLERANCE = 8e-3
_ROUNDS = 20
_COLUMNS = ("op", "pass", "shape", "routing", "contender", "ms", "TFLOP/s", "ours is", "error")


# --- contenders ------------------------------------------------------------------------------------------------------


def contenders(case: Case) -> dict[str, tuple[Callable[..., Any], bool]]:
    """name -> (function of the operands, whether it is torch's). Ours first."""
    work = case.work()
    found = {OURS: (work.function(OURS), False), "XLA": (work.function("xla"), False)}
    if case.op in gpu_cases.MOSAIC_OPS:
        found[MOSAIC] = (work.function(MOSAIC), False)
    if case.op == "grouped_matmul":
        found[DENSE] = (_dense(case), False)
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = (_tokamax(case), False)
        if importlib.util.find_spec("torch"):
            found["torch"] = (_torch(case), True)
    return found


def _dense(case: Case) -> Callable[..., Any]:
    """The rows by the first group's matrix; or all rows into one matrix."""
    if case.pass_name == "drhs":
        return lambda lhs, dout, sizes: jax.lax.dot_general(lhs, dout, (((0,), (0,)), ((), ())))
    contract = 1 if case.pass_name == "dlhs" else 0
    return lambda rows, rhs, sizes: jax.lax.dot_general(rows, rhs[0], (((1,), (contract,)), ((), ())))


def _tokamax(case: Case) -> Callable[..., Any]:
    import tokamax

    matmul = lambda lhs, rhs, sizes: tokamax.ragged_dot(lhs, rhs, group_sizes=sizes)
    if case.pass_name == "fwd":
        return matmul
    if case.pass_name == "dlhs":
        return lambda dout, rhs, sizes: matmul(dout, rhs.swapaxes(1, 2), sizes)
    s = SHAPES[case.shape]
    weights = lambda lhs: jnp.zeros((s.E, s.K, s.N), lhs.dtype)
    return lambda lhs, dout, sizes: jax.vjp(lambda rhs: matmul(lhs, rhs, sizes), weights(lhs))[1](dout)[0]


def _torch(case: Case) -> Callable[..., Any]:
    """Of torch tensors, the group sizes as the rows' ends."""
    import torch

    if case.pass_name == "fwd":
        return lambda lhs, rhs, ends: torch._grouped_mm(lhs, rhs, offs=ends)
    if case.pass_name == "dlhs":
        return lambda dout, rhs, ends: torch._grouped_mm(dout, rhs.transpose(-2, -1), offs=ends)
    return lambda lhs, dout, ends: torch._grouped_mm(lhs.t(), dout, offs=ends)


def _torch_operands(operands: list[Any]) -> list[Any]:
    import torch

    *arrays, sizes = operands
    arrays = [torch.from_numpy(np.asarray(a, np.float32)).to("cuda", torch.bfloat16) for a in arrays]
    return [*arrays, torch.from_numpy(np.cumsum(sizes).astype(np.int32)).cuda()]


# --- timing ----------------------------------------------------------------------------------------------------------


def median_seconds(function: Callable[..., Any], operands: list[Any]) -> tuple[float, str]:
    """(median, how it was taken) of a jitted function's device time."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(function, iterations=_ROUNDS)(*operands)
        if milliseconds:
            return statistics.median(milliseconds) / 1e3, "CUPTI"
    except Exception as error:  # an experimental module: whatever it raises, there is another way
        print(f"no device timer ({type(error).__name__}: {error})", file=sys.stderr)
    return _wall_seconds(lambda: jax.block_until_ready([function(*operands) for _ in range(10)])) / 10, "wall"


def _wall_seconds(call: Callable[[], Any]) -> float:
    call()
    samples = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _torch_seconds(function: Callable[..., Any], operands: list[Any]) -> tuple[float, str]:
    import torch

    function(*operands)
    samples = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*operands)
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples), "torch events"


# --- one case --------------------------------------------------------------------------------------------------------


def measure(case: Case, routing: str, time_of: Callable[..., tuple[float, str]] = median_seconds) -> list[dict]:
    """A row per contender, ours first: seconds and, of ours, the error; or what it raised.

    `time_of(jitted function, operands)` gives (seconds, how they were taken).
    """
    operands, work, rows = gpu_cases.operands(case, routing), case.work(), []
    for name, (function, of_torch) in contenders(case).items():
        row = {"op": case.op, "pass": case.pass_name, "shape": case.shape, "routing": routing, "contender": name}
        try:
            if of_torch:
                row["seconds"], row["timer"] = _torch_seconds(function, _torch_operands(operands))
            else:
                compiled = jax.jit(function)
                if name in (OURS, MOSAIC):
                    row["error_over_largest"] = error(case, compiled(*operands), operands)
                row["seconds"], row["timer"] = time_of(compiled, operands)
            row["flops"] = work.flops
        except Exception as raised:  # a peer that runs out of memory must not end the others' turn
            row["raised"] = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
        rows.append(row)
    for row in rows[1:]:
        if "seconds" in row and "seconds" in rows[0]:
            row["speedup_of_ours"] = row["seconds"] / rows[0]["seconds"]
    return rows


def error(case: Case, got: Any, operands: list[Any]) -> float:
    """The largest difference from float32 over the largest value, of the worst result; ids must be equal."""
    slow = "reference" if case.op in ("route_top_k", "expert_rows", "low_rank_grouped") else "xla_tiles"
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in operands]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(case.work().function(slow))(*wide)
    return max(map(_difference, jax.tree.leaves(got), jax.tree.leaves(expected)))


def _difference(a: jax.Array, b: jax.Array) -> float:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30))


# --- all of them -----------------------------------------------------------------------------------------------------


def verdicts(rows: list[dict]) -> list[str]:
    """The bars, with what they came to, over the grouped matmul's rows."""
    rows = [r for r in rows if r["op"] == "grouped_matmul" and "speedup_of_ours" in r]
    by_case: dict[tuple, list[dict]] = {}
    for row in rows:
        by_case.setdefault((row["shape"], row["pass"], row["routing"]), []).append(row)
    best = {
        case: min((r["speedup_of_ours"] for r in group if r["contender"] not in (DENSE, MOSAIC)), default=None)
        for case, group in by_case.items()
    }
    best = {case: speedup for case, speedup in best.items() if speedup}
    lines = []
    if best:
        mean = math.exp(statistics.fmean(map(math.log, best.values())))
        worst = min(best, key=best.get)
        lines.append(f"over the best peer, worst ({' '.join(worst)}): {best[worst]:.2f} (bar 1.00)")
        lines.append(f"over the best peer, geometric mean: {mean:.2f} (bar 1.30)")
    dense = [r for r in rows if r["contender"] == DENSE and r["shape"] in ("olmoe", "mixtral")]
    for row in dense:
        rate = f"{row['speedup_of_ours']:.2f} (bar 0.70)"
        lines.append(f"share of the dense rate, {row['shape']} {row['pass']} {row['routing']}: {rate}")
    return lines


def cells(row: dict) -> list[str]:
    """A row of the table."""
    names = [row[k] for k in ("op", "pass", "shape", "routing", "contender")]
    if "raised" in row:
        return [*names, row["raised"][:60].replace("|", "/"), "", "", ""]
    rate = f"{row['flops'] / row['seconds'] / 1e12:.0f}" if row["flops"] else ""
    speedup = f"{row['speedup_of_ours']:.2f} x as fast" if "speedup_of_ours" in row else ""
    wrong = f"{row['error_over_largest']:.1e}" if "error_over_largest" in row else ""
    return [*names, f"{row['seconds'] * 1e3:.3f}", rate, speedup, wrong]


def run(args: argparse.Namespace, render: Callable[..., str]) -> None:
    """All cases asked for: the table, the bars, and the file. `render(lines, markdown)` makes the table."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(
            f"bench.py kernels --gpu: needs an NVIDIA GPU, jax finds {device.platform}: see --gpu-static for what can "
            "be told without one"
        )
    rows: list[dict] = []
    about = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "tokamax", "torch") if _installed(p)},
    }
    for case in gpu_cases.cases(args.ops, args.shapes, args.passes):
        for routing in args.routing:
            print(case, routing, file=sys.stderr, flush=True)
            rows += measure(case, routing)
            Path(args.json or _RESULTS).write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(
        about["device"], about["versions"], f"timers: {', '.join(sorted({r['timer'] for r in rows if 'timer' in r}))}"
    )
    print(render([list(_COLUMNS), *map(cells, rows)], args.markdown), *verdicts(rows), sep="\n")
    wrong = [r for r in rows if _wrong(r)]
    print(*(f"WRONG {' '.join(cells(r)[:4])}" for r in wrong), f"{len(wrong)} wrong", sep="\n")
    raise SystemExit(bool(wrong))


def _wrong(row: dict) -> bool:
    if row["contender"] == MOSAIC and row.get("raised", "").startswith("NotImplementedError"):
        return False
    return row["contender"] in (OURS, MOSAIC) and not row.get("error_over_largest", math.inf) <= _TOLERANCE


@functools.cache
def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
