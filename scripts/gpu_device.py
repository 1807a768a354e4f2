"""`bench.py kernels --gpu`: the GPU kernels on the GPU at hand, checked and timed beside what else there is.

    python scripts/bench.py kernels --gpu
    python scripts/bench.py kernels --gpu --ops grouped_matmul --routing multinomial    # the bars alone

Checked against a float32 loop over row tiles ("xla_tiles") on the same operands. Timed beside `jax.lax.ragged_dot`,
tokamax and torch's grouped product, its weights in either layout, where they are installed, and one dense matmul of the
same FLOPs; attention beside cuDNN's and torch's. Contenders take turns, twice, the second time the other way round;
before each, the card works for a while, so that its clock is up. Medians of device time: the sum of a call's kernels by
CUPTI, the same for torch; wall time of many calls where CUPTI is not to be had, and the table says so. No cache is
cleared: the operands of all shapes but `route_top_k`'s are larger than it.

All of it runs in a process beside the command, which begins another one if a kernel never returns or takes the first
one down. Rows, device, versions and command go to docs/results/kernels_gpu_measured.json (or --json) after every case,
the table and the bars into the .md beside it; rows of an earlier run on the same device with the same versions stay.
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
import gpu_process
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import Case
from kernel_cases import SHAPES

#: MOSAIC is ours, too, for one generation of devices, and not what None takes: timed and checked, but no peer.
OURS, MOSAIC, DENSE = "pallas_gpu", "mosaic_gpu", "dense, same FLOPs"
TORCH, TORCH_TURNED = "torch", "torch, weights transposed"
#: of attention only
CUDNN = "cuDNN through jax"
_PACKAGES = ("jax", "jaxlib", "tokamax", "torch")
_RESULTS = Path(__file__).parents[1] / "docs" / "results" / "kernels_gpu_measured.json"
#: Largest difference from float32, over the largest value.
_TOLERANCE = 8e-3
#: calls of one turn, and how long the card works before
_CALLS, _WARM_UP_S = 10, 0.1
#: seconds for one turn, the first of a case compiles: a kernel that never returns must not take all the time there is
_PATIENCE_S = 300
_COLUMNS = ("op", "pass", "shape", "routing", "contender", "ms", "TFLOP/s", "ours is", "wall ms", "error")
_KEY = ("op", "pass", "shape", "routing", "contender")


# --- contenders ------------------------------------------------------------------------------------------------------


def names(case: Case) -> list[str]:
    """Of the contenders, ours first; without those that are not installed."""
    found = [OURS, "XLA", *([MOSAIC] if case.op in gpu_cases.MOSAIC_OPS else [])]
    others: dict[str, str | None] = {}
    if case.op == "grouped_matmul":
        others = {DENSE: None, "tokamax": "tokamax", TORCH: "torch"}
        if case.pass_name != "drhs":
            others[TORCH_TURNED] = "torch"
    elif case.op == "causal_attention":
        others = {CUDNN: None, TORCH: "torch"}
    return found + [name for name, package in others.items() if package is None or importlib.util.find_spec(package)]


def contender(case: Case, name: str) -> Callable[..., Any]:
    """A function of the operands; torch's are of torch tensors."""
    if name in (OURS, MOSAIC):
        return jax.jit(case.work().function(name))
    if name == "XLA":
        return jax.jit(case.work().function("xla"))
    if name in (DENSE, CUDNN):
        return jax.jit(_dense(case) if name == DENSE else _cudnn(case))
    return _torch(case) if name in (TORCH, TORCH_TURNED) else jax.jit(_tokamax(case))


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


def _cudnn(case: Case) -> Callable[..., Any]:
    turn = lambda x: x.swapaxes(1, 2)
    asked = dict(is_causal=True, implementation="cudnn")
    forward = lambda q, k, v: turn(jax.nn.dot_product_attention(turn(q), turn(k), turn(v), **asked))
    return gpu_cases.pullback(forward, 3) if case.pass_name == "bwd" else forward


def _torch_attention(case: Case) -> Callable[..., Any]:
    import torch

    forward = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def both(dout, *operands):
        operands = [x.detach().requires_grad_() for x in operands]
        out = forward(*operands)
        return out, torch.autograd.grad(out, operands, dout)

    return both if case.pass_name == "bwd" else forward


def _torch(case: Case) -> Callable[..., Any]:
    """Of torch tensors, the group sizes as the rows' ends."""
    import torch

    if case.op == "causal_attention":
        return _torch_attention(case)
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    if case.pass_name == "fwd":
        return lambda lhs, rhs, ends: product(lhs, rhs, offs=ends)
    if case.pass_name == "dlhs":
        return lambda dout, rhs, ends: product(dout, rhs.transpose(-2, -1), offs=ends)
    return lambda lhs, dout, ends: product(lhs.t(), dout, offs=ends)


def _torch_operands(operands: list[Any], turned: bool) -> list[Any]:
    """On the card. `turned`: the weights' last two dims are the other way round in memory."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
    floats = [a for a in operands if a.dtype == jnp.bfloat16]
    arrays = [torch.from_numpy(np.array(a, np.float32)).to("cuda", torch.bfloat16) for a in floats]
    if turned:
        arrays[1] = arrays[1].transpose(-2, -1).contiguous().transpose(-2, -1)
    ends = [np.cumsum(sizes).astype(np.int32) for sizes in operands[len(floats) :]]
    return [*arrays, *(torch.from_numpy(e).cuda() for e in ends)]


def _wait(result: Any) -> None:
    """For what either library has begun."""
    first = result[0] if isinstance(result, tuple) else result
    if "torch" in sys.modules and isinstance(first, sys.modules["torch"].Tensor):
        sys.modules["torch"].cuda.synchronize()
    else:
        jax.block_until_ready(result)


# --- timing ----------------------------------------------------------------------------------------------------------


def device_times(call: Callable[[], Any]) -> dict[str, Any]:
    """One turn: {"kernels": seconds of each call's kernels or None, "wall": seconds a call, "no_kernels": why}."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < _WARM_UP_S:
        _wait(call())
    begin = time.perf_counter()
    for _ in range(_CALLS):
        last = call()
    _wait(last)
    times = {"wall": (time.perf_counter() - begin) / _CALLS}
    try:
        return times | {"kernels": _kernel_seconds(call)}
    except Exception as error:  # an experimental module: whatever it raises, there is the wall time
        return times | {"kernels": None, "no_kernels": f"{type(error).__name__}: {error}"[:200]}


def _kernel_seconds(call: Callable[[], Any]) -> list[float]:
    """Seconds of the kernels of each of the calls, by CUPTI. `jax.experimental.mosaic.gpu.profiler.measure` would keep
    the results of all calls, which is tens of GB, and jit what it calls.
    """
    from jax.experimental.mosaic.gpu import profiler

    counters = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    counters._cupti_init()
    try:
        for _ in range(_CALLS):
            last = call()
        _wait(last)
    finally:
        launches = counters._cupti_get_timings(True)
    return of_calls(launches, _CALLS)


def of_calls(launches: list[tuple[str, float]], calls: int) -> list[float]:
    """Seconds of each call, from (kernel, milliseconds) of them all in order."""
    if not launches or len(launches) % calls:
        raise ValueError(f"{len(launches)} kernels in {calls} calls")
    each = len(launches) // calls
    return [sum(ms for _, ms in launches[i * each : (i + 1) * each]) / 1e3 for i in range(calls)]


# --- in the process that has the card --------------------------------------------------------------------------------


class Bench:
    """Contenders of one case, whose operands and compiled functions are kept until another case comes."""

    def __init__(self, times: Callable[[Callable[[], Any]], dict[str, Any]] = device_times):
        self.times, self.case = times, None

    def answer(self, asked: dict[str, str]) -> dict[str, Any]:
        """One turn of {"op", "pass", "shape", "routing", "contender"}: `times`, and, of ours, the error."""
        case, name, routing = Case(asked["op"], asked["pass"], asked["shape"]), asked["contender"], asked["routing"]
        if case != self.case:
            self.case, self.functions, self.operands, self.errors = case, {}, {}, {}
        of_torch = name in (TORCH, TORCH_TURNED)
        function, operands = self._function(name), self._operands(routing, name if of_torch else None)
        found = {}
        if name in (OURS, MOSAIC):
            if (name, routing) not in self.errors:
                self.errors[name, routing] = error(case, function(*operands), operands)
            found["error_over_largest"] = self.errors[name, routing]
        return found | self.times(lambda: function(*operands))

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self.functions:
            self.functions[name] = contender(self.case, name)
        return self.functions[name]

    def _operands(self, routing: str, of_torch: str | None) -> list[Any]:
        if (routing, of_torch) not in self.operands:
            if of_torch:
                made = _torch_operands(self._operands(routing, None), turned=of_torch == TORCH_TURNED)
            else:
                made = gpu_cases.operands(self.case, routing)
            self.operands[routing, of_torch] = made
        return self.operands[routing, of_torch]


def error(case: Case, got: Any, operands: list[Any]) -> float:
    """The largest difference from float32 over the largest value, of the worst result; ids must be equal."""
    slow = "reference" if case.op in ("route_top_k", "expert_rows", "low_rank_grouped") else "xla_tiles"
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in operands]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(case.work().function(slow))(*wide)
    return max(map(_difference, jax.tree.leaves(got), jax.tree.leaves(expected)))


def _difference(a: jax.Array, b: jax.Array) -> float:
    if jnp.issubdtype(b.dtype, jnp.integer):
        return float(jnp.any(a != b))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30))


# --- in the caller's -------------------------------------------------------------------------------------------------


def measure(case: Case, routings: list[str], ask: Callable[[dict[str, str]], dict[str, Any]]) -> list[dict]:
    """A row per routing and contender, ours first: seconds and, of ours, the error; or what it raised. `ask` has one
    turn taken (`Bench.answer`).
    """
    rows = [
        {"op": case.op, "pass": case.pass_name, "shape": case.shape, "routing": routing, "contender": name}
        for routing in routings
        for name in names(case)
    ]
    turns = {id(row): [] for row in rows}
    for row in [*rows, *reversed(rows)]:
        if "raised" not in row:
            answer = ask({key: row[key] for key in _KEY})
            turns[id(row)].append(answer)
            row |= {key: answer[key] for key in ("raised", "error_over_largest", "no_kernels") if key in answer}
    for row in rows:
        if "raised" not in row:
            row |= _medians(turns[id(row)]) | {"flops": case.work().flops}
    for row in rows:
        ours = next(r for r in rows if r["contender"] == OURS and r["routing"] == row["routing"])
        if row is not ours and "seconds" in row and "seconds" in ours:
            # of the same kind: kernels are not held against calls
            key = "seconds" if row["timer"] == ours["timer"] else "wall_seconds"
            row["speedup_of_ours"] = row[key] / ours[key]
    return rows


def _medians(turns: list[dict]) -> dict[str, Any]:
    wall = statistics.median(t["wall"] for t in turns)
    if any(t["kernels"] is None for t in turns):
        return {"seconds": wall, "timer": "wall", "wall_seconds": wall}
    kernels = statistics.median(seconds for t in turns for seconds in t["kernels"])
    return {"seconds": kernels, "timer": "CUPTI", "wall_seconds": wall}


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
        return [*names, row["raised"][:60].replace("|", "/"), "", "", "", ""]
    rate = f"{row['flops'] / row['seconds'] / 1e12:.0f}" if row["flops"] else ""
    speedup = f"{row['speedup_of_ours']:.2f} x as fast" if "speedup_of_ours" in row else ""
    wrong = f"{row['error_over_largest']:.1e}" if "error_over_largest" in row else ""
    return [*names, f"{row['seconds'] * 1e3:.3f}", rate, speedup, f"{row['wall_seconds'] * 1e3:.3f}", wrong]


def run(args: argparse.Namespace, render: Callable[..., str]) -> None:
    """All cases asked for: the table, the bars, and the files. `render(lines, markdown)` makes the table."""
    kind = gpu_process.device_kind("bench.py kernels --gpu", "see --gpu-static for what can be told without one")
    about = {
        "device": kind,
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES if _installed(p)},
        "not_installed": [p for p in _PACKAGES if not _installed(p)],
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    path, rows = Path(args.json or _RESULTS), []
    earlier = _earlier(path, about)
    worker = gpu_process.Worker(__file__, gpu_process.environment("kernels_gpu"))
    for case in gpu_cases.cases(args.ops, args.shapes, args.passes):
        print(case, file=sys.stderr, flush=True)
        routings = args.routing if case.work().sizes is not None else args.routing[:1]
        rows += measure(case, routings, lambda asked: worker.ask(asked, min(args.timeout, _PATIENCE_S)))
        kept = [r for r in earlier if _key(r) not in set(map(_key, rows))]
        path.write_text(json.dumps(about | {"rows": [*kept, *rows]}, indent=1))
        path.with_suffix(".md").write_text(page(about, [*kept, *rows], render))
    worker.close()
    print(about, render([list(_COLUMNS), *map(cells, rows)], args.markdown), *verdicts(rows), sep="\n")
    wrong = [r for r in rows if _wrong(r)]
    print(*(f"WRONG {' '.join(cells(r)[:5])}" for r in wrong), f"{len(wrong)} wrong", sep="\n")
    raise SystemExit(bool(wrong))


def page(about: dict[str, Any], rows: list[dict], render: Callable[..., str]) -> str:
    """What was measured, as a page."""
    timers = {r["timer"] for r in rows if "timer" in r}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    absent = f"; not installed: {', '.join(about['not_installed'])}" if about["not_installed"] else ""
    lines = [f"- {line}" for line in [*verdicts(rows), f"{sum(map(_wrong, rows))} of our results are wrong"]]
    conditions = f"{about['date']}, {versions}{absent}. Times by {' and '.join(sorted(timers)) or 'nothing'}."
    return "\n".join(
        [f"# GPU kernels on {about['device']}", "", f"    {about['command']}", "", conditions, "", *lines, "",
         render([list(_COLUMNS), *map(cells, rows)], True), ""]
    )  # fmt: skip


def _key(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def _earlier(path: Path, about: dict[str, Any]) -> list[dict]:
    """Rows that are there of the same device and versions."""
    known = json.loads(path.read_text()) if path.exists() else {}
    same = all(known.get(name) == about[name] for name in ("device", "versions"))
    return known["rows"] if same else []


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


if __name__ == "__main__":
    gpu_process.serve(Bench().answer)
