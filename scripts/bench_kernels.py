"""`bench.py kernels`: our TPU kernels beside a public one, from their compiled programs, without a TPU.

    python scripts/bench.py kernels --tpu-static --generations v5e,v6e --shapes olmoe,decode

--gpu-static compiles the GPU kernels for an H100 (gpu_static.py), --gpu times them on one (gpu_device.py).

With --tpu-static every case is compiled ahead of time by libtpu in a process of its own and its kernels' scalar
programs are executed on concrete routings (scripts/tpu_sim). Finished cases are kept in .jax_cache/tpu_sim, by the
versions and sources they depend on, so an interrupted run goes on where it stopped. Exit code 1 if a bar of
kernel_bars.py fails.

Columns: sim ms; sim over the roofline; speed-up over the peer; MXU flops issued over useful; HBM bytes over the least
possible; kernels that XLA runs beside ours; VMEM; VLIW bundles; seconds to compile. A "?" marks a simulation that met
a decision it could not follow, which its verdicts repeat; one that did less than the least possible is an error.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_device
import gpu_static
import kernel_bars
import kernel_cases
import tpu_sim
from kernel_cases import OURS, PEER, Case

import pallas_kernels

_HERE = Path(__file__).parent
_CACHE = _HERE.parent / ".jax_cache" / "tpu_sim"
_COLUMNS = (
    ("sim_ms", "sim ms", "{:.3f}"),
    ("over_roofline", "/roofline", "{:.2f}"),
    ("speedup", "speed-up", "{:.2f}"),
    ("issued_over_useful", "issued", "{:.2f}"),
    ("bytes_over_least", "bytes", "{:.2f}"),
    ("side_kernels", "side", "{:d}"),
    ("vmem_mib", "VMEM MiB", "{:.1f}"),
    ("bundles", "bundles", "{:d}"),
    ("compile_s", "compile s", "{:.0f}"),
)
#: Less than the least possible is no result.
_AT_LEAST_ONE = ("over_roofline", "issued_over_useful", "bytes_over_least")
_NAMES = ("op", "shape", "pass", "generation", "routing", "implementation")


# --- one case, from the cache or measured ----------------------------------------------------------------------------


def figures(case: Case, generation: str, timeout_s: float) -> dict:
    """tpu_sim's figures. Failures are not kept."""
    path = _CACHE / f"{_key(case, generation)}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = tpu_sim.profile_case("kernel_cases:build", generation, case.settings(), timeout_s=timeout_s)
    if result["ok"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(path)
    return result


def _key(case: Case, generation: str) -> str:
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "libtpu")]
    sources = [_HERE / "kernel_cases.py", *sorted((_HERE / "tpu_sim").glob("*.py"))]
    if case.implementation != PEER:
        sources += sorted(Path(pallas_kernels.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(json.dumps([case.settings(), generation, versions]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


# --- rows of the table -----------------------------------------------------------------------------------------------


def rows_of(case: Case, generation: str, result: dict) -> list[dict[str, Any]]:
    """One row per routing, or one with the error."""
    name = {"op": case.op, "shape": case.shape, "pass": case.pass_name, "generation": generation}
    name["implementation"] = case.implementation
    if not result["ok"]:
        not_available = result["error"].startswith("NotImplementedError")
        return [{**name, "routing": "multinomial", "error": result["error"], "not_available": not_available}]
    common = {
        "side_kernels": result["xla_side_kernels"]["count"],
        "vmem_mib": (result["vmem_peak_bytes"] or 0) / 2**20,
        "bundles": max((k["bundles_static"] for k in result["kernels"]), default=0),
        "compile_s": result["compile_s"],
    }
    return [
        {**name, "routing": routing, **common, **_simulated(variant)} for routing, variant in result["variants"].items()
    ]


def _simulated(variant: dict) -> dict[str, Any]:
    kernels = variant["kernels"]
    error = next((k["error"] for k in kernels if k["error"]), None)
    if variant.get("unmatched_calls") or not kernels:
        error = f"no compiled program found for {variant.get('unmatched_calls')}"
    if error:
        return {"error": error}
    total = lambda *keys: sum(k[key] for k in kernels for key in keys)
    least = variant["min_bytes"]
    useful = variant["useful_flops"]
    figures = {
        "sim_ms": variant["sim_seconds"] * 1e3,
        "over_roofline": variant["sim_seconds"] / variant["roofline_s"],
        "issued_over_useful": total("issued_flops") / useful if useful else None,
        "bytes_over_least": total("hbm_read", "hbm_write", "vmem_operand_bytes") / least,
        "core_imbalance": max(max(k["cores_cycles"]) / min(k["cores_cycles"]) for k in kernels),
        "doubtful": total("unknown_decisions", "unmatched_waits") > 0,
    }
    below = [name for name in _AT_LEAST_ONE if figures[name] is not None and figures[name] < 0.99]
    # work was skipped: the kernel's scalar program was not followed
    return {"error": f"not simulated: {', '.join(below)} below 1"} if below else figures


def add_speedups(rows: list[dict]) -> None:
    """The other's time (the peer's, or ours with wide weights) over ours, where both are known."""
    peers = {_case(row): row["sim_ms"] for row in rows if row["implementation"] != OURS and "sim_ms" in row}
    for row in rows:
        if row["implementation"] == OURS and "sim_ms" in row and _case(row) in peers:
            row["speedup"] = peers[_case(row)] / row["sim_ms"]


def _case(row: dict) -> tuple:
    return tuple(row[name] for name in _NAMES[:-1])


# --- printing --------------------------------------------------------------------------------------------------------


def table(rows: list[dict], markdown: bool) -> str:
    """All rows, aligned or as Markdown."""
    lines = [[*_NAMES, *(title for _, title, _ in _COLUMNS)]]
    lines += [[*(str(row[name]) for name in _NAMES), *_cells(row)] for row in rows]
    return _render(lines, markdown)


def _cells(row: dict) -> list[str]:
    if row.get("error"):
        reason = "not available" if row.get("not_available") else row["error"].replace("|", "/").replace("\n", " ")
        return [reason[:60], *[""] * (len(_COLUMNS) - 1)]
    cells = ["" if row.get(key) is None else form.format(row[key]) for key, _, form in _COLUMNS]
    return [cells[0] + ("?" if row["doubtful"] else ""), *cells[1:]]


def verdict_table(verdicts: list[dict], markdown: bool) -> str:
    """One line per bar and case, and how many there are of each verdict; of what is not available only the number."""
    value = lambda v: "" if v["value"] is None else f"{v['value']:.3f}".rstrip("0").rstrip(".")
    lines = [["case", "bar", "value", "verdict"]]
    lines += [[v["case"], v["bar"], value(v), v["verdict"]] for v in verdicts if v["verdict"] != "not available"]
    counts = collections.Counter(v["verdict"] for v in verdicts)
    summary = "bars: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return (f"{_render(lines, markdown)}\n\n" if len(lines) > 1 else "") + summary


def _render(lines: list[list[str]], markdown: bool) -> str:
    if markdown:
        head, *body = ("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


# --- command line ----------------------------------------------------------------------------------------------------


def _some_of(known: Any):
    """An argparse type: comma-separated names out of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [n for n in names if n not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


#: What each mode knows of ops and passes, and what it runs.
_MODES = {
    "--tpu-static": (kernel_cases.BUILDERS, kernel_cases.PASSES, lambda args: _tpu_static(args)),
    "--gpu-static": (gpu_cases.OPS, gpu_cases.PASSES, lambda args: gpu_static.run(args, _render)),
    "--gpu": (gpu_cases.OPS, gpu_cases.PASSES, lambda args: gpu_device.run(args, _render)),
}


def _run(args: argparse.Namespace) -> None:
    ops, passes, run = _MODES[args.mode]
    for name, known in (("ops", ops), ("passes", passes)):
        given = getattr(args, name) or list(known)
        if unknown := [n for n in given if n not in known]:
            raise SystemExit(f"bench.py kernels {args.mode}: no {', '.join(unknown)} here; known: {', '.join(known)}")
        setattr(args, name, given)
    run(args)


def _tpu_static(args: argparse.Namespace) -> None:
    rows: list[dict] = []
    todo = [(c, g) for c in kernel_cases.cases(args.ops, args.shapes, args.passes) for g in args.generations]
    for i, (case, generation) in enumerate(todo):
        print(f"{i + 1}/{len(todo)}", *case.settings().values(), generation, file=sys.stderr, flush=True)
        result = figures(case, generation, args.timeout)
        rows += [r for r in rows_of(case, generation, result) if r["routing"] in args.routing or r.get("error")]
        add_speedups(rows)
        if args.json:
            _write(args.json, rows)
    print(table(rows, args.markdown))
    verdicts = kernel_bars.judge(rows)
    if verdicts:
        print(f"\n{verdict_table(verdicts, args.markdown)}")
    if args.json:
        _write(args.json, rows, verdicts)
    raise SystemExit(any(v["verdict"] == "FAIL" for v in verdicts))


def _write(path: str, rows: list[dict], verdicts: list[dict] | None = None) -> None:
    finite = lambda row: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    Path(path).write_text(json.dumps({"rows": [*map(finite, rows)], "verdicts": verdicts}, indent=1))


def add_kernels(subparsers: Any) -> None:
    """Compiled kernels: the TPU's simulated, the GPU's looked at or timed."""
    parser = subparsers.add_parser(
        "kernels",
        help="our kernels: compiled and simulated (TPU), compiled (GPU), or timed (GPU)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = lambda flag, known, default: parser.add_argument(
        flag,
        type=_some_of(known),
        default=default,
        metavar="A,B",
        help=f"of {', '.join(known)} (default: {','.join(default or ['all'])})",
    )
    modes = parser.add_mutually_exclusive_group(required=True)
    for mode, text in (
        ("--tpu-static", "compile ahead of time for TPUs and simulate; needs libtpu"),
        ("--gpu-static", "compile ahead of time for an H100; needs the CUDA plugin, no GPU"),
        ("--gpu", "check and time on the GPU at hand"),
    ):
        modes.add_argument(mode, dest="mode", action="store_const", const=mode, help=text)
    names("--ops", list(dict.fromkeys([*kernel_cases.BUILDERS, *gpu_cases.OPS])), None)
    names("--generations", tpu_sim.GENERATIONS, list(tpu_sim.GENERATIONS))
    names("--shapes", kernel_cases.SHAPES, list(kernel_cases.SHAPES))
    names("--passes", list(dict.fromkeys([*kernel_cases.PASSES, *gpu_cases.PASSES])), None)
    names("--routing", kernel_cases.ROUTINGS, list(kernel_cases.ROUTINGS))
    names("--gpus", gpu_static.GPUS, ["h100"])
    names("--implementations", gpu_cases.IMPLEMENTATIONS, ["pallas_gpu", "mosaic_gpu"])
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one case")
    parser.add_argument("--json", metavar="OUT", help="write rows and verdicts there, after every case")
    parser.add_argument("--markdown", action="store_true")
    parser.set_defaults(run=_run)
