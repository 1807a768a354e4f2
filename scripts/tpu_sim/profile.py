"""Compiles one case for one TPU generation and simulates its kernels. Runs in a process of its own: see driver.py.

A case is what `MODULE:FUNC(**settings)` returns: (fn, args) or (fn, args, meta), args being ShapeDtypeStructs or
arrays, and meta a dict:
  concrete      {flat argument index: array}: values that steer control flow, e.g. group sizes
  useful_flops  flops that the algorithm needs, without padding;  min_bytes  compulsory HBM traffic
  by_shape      {"9": array}: integer kernel operands that cannot be traced from the inputs, by the text of their shape
  variants      {name: {concrete, useful_flops, min_bytes}}: several inputs for one compilation
"""

import glob
import importlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tpu_sim.generations import GENERATIONS, Generation

_HLO_DTYPES = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "bool": "pred",
    **{f"int{bits}": f"s{bits}" for bits in (4, 8, 16, 32)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 32)},
}
_UNINTERESTING = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")


def environment(dump: str) -> dict[str, str]:
    """What libtpu must find in the environment before it is loaded: dump folder, no network, no device."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true {os.environ.get('EXTRA_LIBTPU_ARGS', '')}"
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags,
    }


def profile(target: str, settings: dict[str, str], generation_name: str, dump: str, limit_s: float) -> dict:
    """The figures of one case on one generation; `dump` is an empty folder, also named in LIBTPU_INIT_ARGS."""
    generation = GENERATIONS[generation_name]
    module, function = target.split(":")
    fn, args, meta = (*getattr(importlib.import_module(module), function)(**settings), {})[:3]
    figures, jaxpr, cores = _compile(fn, args, generation)
    figures["vmem_peak_bytes"] = _vmem_peak(dump)
    programs, side = _programs(dump)
    figures["xla_side_kernels"] = {"count": len(side), "bundles_static": sum(side.values())}
    figures["kernels"] = [_static_figures(name, program, generation) for name, program in programs.items()]
    figures["variants"] = {
        name: _variant(jaxpr, args, variant, programs, generation, cores, limit_s)
        for name, variant in (meta.get("variants") or {"": meta}).items()
    }
    return {"generation": generation_name, "ok": True, **figures}


def _compile(fn: Callable, args: tuple, generation: Generation) -> tuple[dict, Any, int]:
    """(XLA's own figures, the closed jaxpr, cores that share the program)."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=generation.topology)
    device = topology.devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    begun = time.monotonic()
    jitted = jax.jit(fn, in_shardings=jax.tree.map(lambda _: sharding, tuple(args)), out_shardings=sharding)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels may ask which TPU they are built for
        traced = jitted.trace(*args)
        compiled = traced.lower().compile()
    seconds = time.monotonic() - begun
    cost, memory, hlo = compiled.cost_analysis() or {}, compiled.memory_analysis(), compiled.as_text()
    entry = Counter(re.findall(r"= \S+(?:\{[^}]*\})? ([a-z\-]+)\(", hlo[hlo.find("\nENTRY") :]))
    cores = getattr(device, "num_cores", 1) or 1
    figures = {
        "device_kind": device.device_kind,
        "cores_in_program": cores,
        "compile_s": round(seconds, 1),
        "xla_flops": cost.get("flops"),
        "xla_bytes": cost.get("bytes accessed"),
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "entry_ops": {op: n for op, n in entry.most_common() if op not in _UNINTERESTING},
    }
    return figures, traced.jaxpr, cores


def _vmem_peak(dump: str) -> int | None:
    """Of the op that holds most; None if no report can be read."""
    peaks = []
    for path in glob.glob(os.path.join(glob.escape(dump), "*vmem_report.html")):
        with open(path, errors="replace") as file:
            html = file.read()
        match = re.search(r"const DATA\s*=\s*", html)
        try:
            ops = json.JSONDecoder().raw_decode(html[match.end() :])[0]["hlo_breakdowns"].values()
            peaks.append(max((sum(b.get("block_size", 0) for b in op.get("blocks", [])) for op in ops), default=0))
        except (AttributeError, ValueError, LookupError, TypeError):
            continue  # the report's form is nobody's promise
    return max(peaks, default=None)


def _programs(dump: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(Pallas programs by name, bundles of XLA's own kernels by name)."""
    from tpu_sim.llo import count_bundles
    from tpu_sim.program import Program

    programs, side = {}, {}
    for path in sorted(glob.glob(os.path.join(glob.escape(dump), "*-final_bundles.txt"))):
        base = os.path.basename(path)
        name = re.sub(r"-\d+-final_bundles\.txt$", "", re.sub(r"^\d+-", "", base))
        if "schedule-analysis" in base or name.startswith(("TLP", "<late")):
            continue
        with open(path, errors="replace") as file:
            text = file.read()
        if _is_pallas(text):
            programs[name] = Program(text)
        else:
            side[name] = count_bundles(text)
    return programs, side


def _is_pallas(text: str) -> bool:
    if "tpu_custom_call" not in text and "vmatmul" in text:
        return True  # XLA's own matmuls count too: an op may lower to them
    if len(text) < 4000 or "custom-call(" not in text:
        return False
    if "tpu_custom_call" in text or "exit bundle" not in text:
        return True
    return "custom-call(" in text.rsplit("exit bundle", 1)[-1]


def _static_figures(name: str, program: Any, generation: Generation) -> dict:
    matmuls = program.matmuls_between(0, program.size)
    busy = matmuls * generation.mxu_cycles / generation.mxus / max(1, program.size)
    return {
        "name": name,
        "bundles_static": program.size,
        "vmatmul_static": matmuls,
        "mxu_ratio_static": round(busy, 3),
        "unknown_ops": dict(program.unknown_ops) or None,
    }


def _variant(
    jaxpr: Any, args: tuple, variant: dict, programs: dict, generation: Generation, cores: int, limit_s: float
) -> dict:
    """Simulates all kernels on one variant's inputs."""
    from tpu_sim.known import pallas_calls

    figures: dict[str, Any] = {name: variant.get(name) for name in ("useful_flops", "min_bytes")}
    flops, least_bytes = variant.get("useful_flops"), variant.get("min_bytes") or 0
    if flops or least_bytes:
        compute_s = (flops or 0) / (generation.peak_flops * cores)
        memory_s = least_bytes / (generation.hbm_bytes_per_s * cores)
        figures["roofline_s"] = max(compute_s, memory_s)
        figures["bound"] = "compute" if compute_s >= memory_s else "memory"
    calls, tables = pallas_calls(jaxpr, args, variant.get("concrete", {}))
    matched, unmatched = _match(calls, tables, programs, variant.get("by_shape", {}))
    if unmatched:
        figures["unmatched_calls"] = unmatched
    figures["kernels"] = [_kernel_figures(*call, generation, cores, limit_s) for call in matched]
    seconds = sum(kernel["seconds"] for kernel in figures["kernels"])
    if seconds:
        figures["sim_seconds"] = seconds
        if figures.get("roofline_s"):
            figures["roofline_fraction"] = round(figures["roofline_s"] / seconds, 4)
    return figures


def _match(calls: list, tables: list, programs: dict, by_shape: dict) -> tuple[list, list]:
    """([(name, program, operand values)], names of calls without a program)."""
    if not calls:  # pl.kernel and core_map: every kernel once, integer operands by their shape
        tables = {**{",".join(map(str, t.shape)): t for t in reversed(tables)}, **by_shape}
        return [(n, p, _operands_by_shape(p, tables, by_shape)) for n, p in programs.items() if p.size > 5], []
    matched, unmatched = [], []
    for call in calls:
        wanted = [(_HLO_DTYPES.get(o.dtype, o.dtype), ",".join(map(str, o.shape))) for o in call.operands]
        name = _program_of(call.name, wanted, programs)
        if name is None:
            unmatched.append([call.name, str(wanted)[:300]])
        else:
            matched.append((name, programs[name], [o.value for o in call.operands]))
    return matched, unmatched


def _operands_by_shape(program: Any, tables: dict, by_shape: dict) -> list:
    values = [None] * (max(program.operands, default=-1) + 1)
    for i, (_, dtype, dims) in program.operands.items():
        if dims in by_shape or dtype in ("s32", "u32"):
            values[i] = tables.get(dims)
    return values


def _program_of(call_name: str, wanted: list, programs: dict) -> str | None:
    """By the operands' types in order, else by name, else by the operands' types in any order."""
    tests = (
        lambda name, p: p.signature()[: len(wanted)] == wanted,
        lambda name, p: name.split(".")[0] == re.sub(r"\W", "_", call_name),
        lambda name, p: sorted(p.signature()) == sorted(wanted),
    )
    for test in tests:
        for name, program in programs.items():
            if test(name, program):
                return name
    return None


def _vmem_operand_bytes(program: Any) -> int:
    """Of operands that XLA keeps in VMEM: where they come from or go to HBM, the kernel has no part in it."""
    bits = {hlo: int(re.search(r"\d+", hlo).group()) for hlo in _HLO_DTYPES.values() if hlo != "pred"}
    sizes = (
        bits.get(dtype, 8) * math.prod(int(d) for d in dims.split(",") if d) // 8
        for kind, dtype, dims in program.operands.values()
        if kind == "vmem"
    )
    return sum(sizes)


def _kernel_figures(
    name: str, program: Any, operands: list, generation: Generation, cores: int, limit_s: float
) -> dict:
    from tpu_sim.machine import simulate

    ids = range(cores if program.core_id_address is not None else 1)
    runs = [simulate(program, generation, operands, limit_s, core) for core in ids]
    slowest, error, hot = max(runs, key=lambda run: run[0].cycles)
    machines = [run[0] for run in runs]
    matmuls = sum(m.matmuls for m in machines)
    read, written = (sum(m.bytes[way] for m in machines) for way in ("read", "write"))
    busy = slowest.matmuls * generation.mxu_cycles / generation.mxus / max(1, slowest.cycles)
    return {
        "name": name,
        "cycles": round(slowest.cycles),
        "seconds": slowest.cycles / generation.clock_hz,
        "cores_cycles": [round(m.cycles) for m in machines],
        "bundles": slowest.bundles,
        "vmatmul": matmuls,
        "issued_flops": matmuls * generation.flops_per_issue,
        "mxu_busy": round(busy, 3),
        "hbm_read": read,
        "hbm_write": written,
        "vmem_operand_bytes": _vmem_operand_bytes(program),
        "onchip_dma": slowest.bytes["on_chip"],
        "dma_count": dict(slowest.dmas),
        "dma_stall_cycles": round(slowest.dma_stall),
        "mxu_stall_cycles": round(slowest.mxu_stall),
        "hbm_s": (read + written) / generation.hbm_bytes_per_s / len(runs),
        "unknown_decisions": slowest.unknown_decisions,
        "unmatched_waits": slowest.unmatched_waits,
        "error": error,
        "hot": hot or None,
    }
