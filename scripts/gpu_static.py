"""`bench.py kernels --gpu-static`: the GPU kernels compiled for an H100 (or another) by XLA, without a GPU.

    python scripts/bench.py kernels --gpu-static --shapes olmoe,qwen3 --gpus h100,a100

Every case is compiled in a process of its own, by the CUDA plugin (jax 0.12, Python 3.12: pip install jax-cuda13-plugin
jax-cuda13-pjrt nvidia-cuda-nvcc; no driver is needed) for a device described in text. Exit code 1 if a kernel spills
registers, or if its program needs scratch of more than 1% of its operands at a training shape.

Columns: scratch that XLA allocates, and over the bytes of operands and results; kernels launched, ours and XLA's; the
most registers per thread, bytes spilled and shared memory of ours, as ptxas has them; seconds to compile. Nothing is
timed: this tells that a kernel compiles and what it occupies, not what it costs.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Case

#: What XLA's GPU compiler asks about a device, with what differs; by NVIDIA's data sheets.
_DEVICE = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_core} shared_memory_per_block_optin: {shared}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""
GPUS = {
    "h100": dict(
        kind="NVIDIA H100 80GB HBM3", capability="major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", cores=132,
        fpus=128, threads=2048, shared=232448, shared_core=233472, l2=52428800, bandwidth=3352320000000, clock=1.98,
        memory=84942979072,
    ),
    "a100": dict(
        kind="NVIDIA A100-SXM4-80GB", capability="major: 8 minor: 0", cores=108, fpus=64, threads=2048, shared=166912,
        shared_core=167936, l2=41943040, bandwidth=2039000000000, clock=1.41, memory=84942979072,
    ),
    "l4": dict(
        kind="NVIDIA L4", capability="major: 8 minor: 9", cores=58, fpus=128, threads=1536, shared=101376,
        shared_core=102400, l2=50331648, bandwidth=300000000000, clock=2.04, memory=24152899584,
    ),
}  # fmt: skip
_HERE = Path(__file__).parent
_MOST_SCRATCH = 0.01
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
#: Names of our kernels; other launches are XLA's.
_OURS = ("matmul_rows", "weight_gradient", "route_top_k", "expert_rows", "sum_choices", "low_rank_rows",
         "low_rank_rows_backward", "mosaic_matmul_rows", "mosaic_weight_gradient", "attention", "attention_dq",
         "attention_dkv")  # fmt: skip
_OTHERS = r": k(?:Kernel|Gemm|CublasLtMatmul|Cub\w*|Sort|Memset\w*|Memzero|Copy|DeviceToDeviceCopy) "
_COLUMNS = ("op", "pass", "shape", "implementation", "gpu", "scratch", "/operands", "ours", "XLA's", "registers",
            "spilled", "shared KiB", "compile s")  # fmt: skip


# --- in the process of one case --------------------------------------------------------------------------------------


def described_devices(gpu: str) -> list[Any]:
    """One device of that kind that programs can be compiled for, and that is not there."""
    from jax.experimental import topologies

    target = _DEVICE.format(**GPUS[gpu])
    described = dict(platform="cuda", topology_name=gpu, target_config=target, topology="1x1x1")
    return topologies.get_topology_desc(**described).devices[:1]


def compile_case(case: Case, implementation: str, gpu: str = "h100") -> dict[str, Any]:
    """Compiles; {"scratch_bytes", "operand_bytes", "compile_s"}."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(described_devices(gpu)), ("x",))
    work, sharding = case.work(), NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in work.args]
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = jax.jit(work.function(implementation)).lower(*args).compile().memory_analysis()
    return {
        "scratch_bytes": memory.temp_size_in_bytes,
        "operand_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "compile_s": time.perf_counter() - begin,
    }


# --- in the caller's -------------------------------------------------------------------------------------------------


def figures(case: Case, implementation: str, gpu: str, timeout_s: float) -> dict[str, Any]:
    """compile_case's, and what ptxas says of the kernels; or {"error"}."""
    names = (case.op, case.pass_name, case.shape, implementation, gpu)
    return compiled_alone([str(_HERE / "gpu_static.py"), *names], timeout_s, mosaic=implementation == "mosaic_gpu")


def compiled_alone(script: list[str], timeout_s: float, mosaic: bool = False) -> dict[str, Any]:
    """Runs a Python script that compiles one program: what it prints on its last line as JSON, what ptxas says of our
    kernels, and what is launched; or {"error"}.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_static_") as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of libraries that only a program at work needs
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PYTHONPATH": str(_HERE.parent),
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "subprocess_compilation=5",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_gpu_ptx_compiler_extra_flags=-v",
        }
        try:
            done = subprocess.run(
                [sys.executable, *script], capture_output=True, text=True, timeout=timeout_s, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"error": f"timed out after {timeout_s:g} s"}
        if done.returncode:
            return {"error": last_error(done.stderr)}
        thunks = "".join(path.read_text() for path in Path(folder).glob("*thunk_sequence.txt"))
    log = done.stdout + done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), **of_kernels(log), **of_thunks(thunks, mosaic)}


def last_error(log: str) -> str:
    """The line of a Python program's log that says what it died of."""
    lines = log.splitlines()
    errors = [line for line in lines if re.match(r"\w*(\.\w+)*(Error|Exception)\b", line)]
    return (errors or lines or ["died"])[-1][:300]


def of_kernels(log: str) -> dict[str, Any]:
    """The most that any of our kernels takes, from ptxas' own report."""
    registers, spilled = [], []
    for entry in log.split("Compiling entry function ")[1:]:
        if _ours(entry.split("'")[1]):
            registers += [int(n) for n in re.findall(r"Used (\d+) registers", entry)[:1]]
            spilled += [int(stores) + int(loads) for stores, loads in _SPILLS.findall(entry)[:1]]
    return {"registers": max(registers, default=None), "spilled_bytes": max(spilled, default=None)}


def _ours(name: str) -> bool:
    """Whether a kernel is ours; XLA numbers those of one name, Mosaic adds its own."""
    return re.sub(r"(_mosaic_gpu_kernel)?(_+\d+)*$", "", name) in _OURS


def of_thunks(text: str, mosaic: bool) -> dict[str, Any]:
    """Launches of our kernels and of XLA's, from XLA's list of steps. There Mosaic kernels are calls without a name."""
    launches = re.findall(r"kCustomKernel.*?\] (\w+) .*shared_memory: (\d+) bytes", text)
    shared = [int(size) for name, size in launches if _ours(name)]
    ours = len(shared) + (text.count(": kCustomCall ") if mosaic else 0)
    others = len(launches) - len(shared) + len(re.findall(_OTHERS, text))
    return {"our_kernels": ours, "xla_kernels": others, "shared_bytes": max(shared, default=None)}


def failed(row: dict[str, Any]) -> str | None:
    """Which bar the row fails."""
    if row["implementation"] == "xla" or row.get("not_available"):
        return None
    if "error" in row:
        return row["error"]
    if row["spilled_bytes"]:
        return f"{row['spilled_bytes']} bytes spilled"
    judged = row["op"].startswith("grouped_matmul") and "decode" not in row["shape"]
    if judged and row["scratch_bytes"] > _MOST_SCRATCH * row["operand_bytes"]:
        return f"scratch {row['scratch_bytes'] / row['operand_bytes']:.1%} of the operands"
    return None


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    names = [row[name] for name in ("op", "pass", "shape", "implementation", "gpu")]
    if "error" in row:
        return [*names, "not available" if row["not_available"] else row["error"][:60], *[""] * 7]
    shown = lambda value, scale=1: "" if value is None else f"{value / scale:.0f}"
    scratch, operands = row["scratch_bytes"], row["operand_bytes"]
    of_ours = [shown(row["registers"]), shown(row["spilled_bytes"]), shown(row["shared_bytes"], 1024)]
    if not row["our_kernels"]:
        of_ours = ["", "", ""]
    size = f"{scratch / 2**20:.1f} MiB" if scratch < 2**30 else f"{scratch / 2**30:.1f} GiB"
    counts = [str(row["our_kernels"]), str(row["xla_kernels"])]
    return [*names, size, f"{scratch / operands:.2%}", *counts, *of_ours, f"{row['compile_s']:.0f}"]


def run(args: argparse.Namespace, render: Any) -> None:
    """All cases asked for: the table, and exit code 1 if a bar fails. `render(lines, markdown)` makes the table."""
    need_compilers("bench.py kernels --gpu-static")
    cases = gpu_cases.cases(args.ops, args.shapes, args.passes)
    todo = [(c, i, g) for i in args.implementations for c in cases for g in args.gpus]
    rows, todo = [], [(c, i, g) for c, i, g in todo if i != "mosaic_gpu" or c.op in gpu_cases.MOSAIC_OPS]
    for number, (case, implementation, gpu) in enumerate(todo):
        print(f"{number + 1}/{len(todo)}", case, implementation, gpu, file=sys.stderr, flush=True)
        row = {"op": case.op, "pass": case.pass_name, "shape": case.shape, "implementation": implementation, "gpu": gpu}
        row |= figures(case, implementation, gpu, args.timeout)
        rows.append(row | {"not_available": row.get("error", "").startswith("NotImplementedError")})
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))
    print(render([list(_COLUMNS), *map(cells, rows)], args.markdown))
    failures = [
        f"{r['op']} {r['pass']} {r['shape']} {r['implementation']} {r['gpu']}: {why}"
        for r in rows
        if (why := failed(r))
    ]
    print(*(f"FAIL {f}" for f in failures), f"{len(rows)} cases, {len(failures)} fail a bar", sep="\n")
    raise SystemExit(bool(failures))


def need_compilers(command: str) -> None:
    """Exits with what must be installed, if something must."""
    missing = [m for m in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13") if not _found(m)]
    if missing:
        raise SystemExit(
            f"{command}: {', '.join(missing)} not found: needs jax >= 0.12 (Python >= 3.12) and "
            "pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc, all of jax's version (make kernels-gpu)"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    print(json.dumps(compile_case(Case(*sys.argv[1:4]), *sys.argv[4:])))
