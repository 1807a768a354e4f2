"""The GPU kernels' benchmarks, without a GPU: what they read, what they compare, and what they say where they can't."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_kernels  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_device  # noqa: E402
import gpu_process  # noqa: E402
import gpu_static  # noqa: E402
import kernel_cases  # noqa: E402

PTXAS = """ptxas info    : Compiling entry function 'matmul_rows__1' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 174 registers, used 1 barriers
ptxas info    : Compiling entry function 'loop_select_fusion' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compiling entry function 'mosaic_weight_gradient_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
THUNKS = """001: kCustomKernel [source       | next=002 (1)] loop_fusion_1 grid: [1, 1, 1] threads: [9, 1, 1]  shared_memory: 0 bytes
002: kCustomKernel [prev=001 (1) | sink        ] matmul_rows__1 grid: [9, 1, 1] threads: [9, 1, 1]  shared_memory: 196608 bytes
003: kCustomCall   [prev=002 (1) | sink        ] kCustomCall
"""  # noqa: E501


def test_compilers_reports_are_read():
    assert gpu_static.of_kernels(PTXAS) == {"registers": 174, "spilled_bytes": 20}
    assert gpu_static.of_kernels("") == {"registers": None, "spilled_bytes": None}
    expected = {"our_kernels": 1, "xla_kernels": 1, "shared_bytes": 196608}
    assert gpu_static.of_thunks(THUNKS, mosaic=False) == expected
    assert gpu_static.of_thunks(THUNKS, mosaic=True) == {**expected, "our_kernels": 2}


def test_bars_of_compiled_kernels():
    row = {"op": "grouped_matmul", "pass": "fwd", "shape": "olmoe", "implementation": "pallas_gpu", "spilled_bytes": 0}
    row |= {"scratch_bytes": 10, "operand_bytes": 1000, "not_available": False}
    assert gpu_static.failed(row) is None
    assert gpu_static.failed(row | {"scratch_bytes": 11}) == "scratch 1.1% of the operands"
    assert gpu_static.failed(row | {"spilled_bytes": 4}) == "4 bytes spilled"
    assert gpu_static.failed(row | {"error": "ValueError: no"}) == "ValueError: no"
    assert gpu_static.failed(row | {"implementation": "xla", "scratch_bytes": 999}) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--gpu"], "needs an NVIDIA GPU, jax finds cpu"),
        (["--gpu-static"], "pip install jax-cuda13-plugin"),
        (["--gpu", "--ops", "low_rank_matmul"], "no low_rank_matmul here; known: grouped_matmul, "),
    ],
)
def test_says_what_it_needs(command, message, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout='["cpu", "cpu"]\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: answer)
    monkeypatch.setattr(gpu_static, "_found", lambda module: False)
    parser = argparse.ArgumentParser()
    bench_kernels.add_kernels(parser.add_subparsers())
    args = parser.parse_args(["kernels", *command])
    with pytest.raises(SystemExit, match=message) as raised:
        args.run(args)
    assert "\n" not in str(raised.value)


def test_a_case_is_checked_and_compared(monkeypatch):
    """Interpreted, with times that are given: ours, XLA's, the dense one's and, without a device to run on, torch's."""
    monkeypatch.setitem(kernel_cases.SHAPES, "tiny", kernel_cases.Shape(24, 16, 8, 4, 2))
    monkeypatch.setattr(gpu_device, "names", lambda case: [gpu_device.OURS, "XLA", gpu_device.MOSAIC, gpu_device.DENSE])
    seconds = iter([2e-6, 6e-6, 1e-6, 1e-6, 6e-6, 2e-6])
    times = lambda call: {"kernels": [next(seconds)], "wall": 1.0}
    bench, turns = gpu_device.Bench(times), []

    def ask(asked):
        turns.append(asked["contender"])
        try:
            return bench.answer(asked)
        except NotImplementedError as raised:
            return {"raised": f"NotImplementedError: {raised}"}

    rows = gpu_device.measure(gpu_cases.Case("grouped_matmul", "drhs", "tiny"), ["zipf"], ask)
    assert turns == [r["contender"] for r in rows] + [gpu_device.DENSE, "XLA", gpu_device.OURS]
    assert "takes 128 rows or more" in rows[2]["raised"]
    assert not gpu_device._wrong(rows.pop(2))
    assert rows[0]["error_over_largest"] < gpu_device._TOLERANCE and "raised" not in rows[0]
    assert [r.get("speedup_of_ours") for r in rows] == [None, pytest.approx(3), pytest.approx(0.5)]
    table = [gpu_device.cells(r) for r in rows]
    assert table[0][5:7] == ["0.002", "0"] and table[1][7] == "3.00 x as fast"
    rows = [r | {"shape": "olmoe"} for r in rows]
    lines = [
        "over the best peer, worst (olmoe drhs zipf): 3.00 (bar 1.00)",
        "over the best peer, geometric mean: 3.00 (bar 1.30)",
        "share of the dense rate, olmoe drhs zipf: 0.50 (bar 0.70)",
    ]
    assert gpu_device.verdicts(rows) == lines
    about = {
        "device": "NVIDIA H100",
        "versions": {"jax": "1"},
        "not_installed": ["tokamax"],
        "date": "d",
        "command": "c",
    }
    page = gpu_device.page(about, rows, bench_kernels._render)
    assert all(line in page for line in lines) and "not installed: tokamax" in page and "Times by CUPTI" in page


def test_times_are_compared_with_their_like():
    answers = {
        gpu_device.OURS: {"kernels": [1.0, 3.0], "wall": 4.0},
        "XLA": {"kernels": None, "no_kernels": "RuntimeError: none", "wall": 8.0},
    }
    case = gpu_cases.Case("route_top_k", "fwd", "olmoe")
    ours, xla = gpu_device.measure(case, ["zipf"], lambda asked: dict(answers[asked["contender"]]))
    assert (ours["seconds"], ours["timer"]) == (2.0, "CUPTI")
    assert (xla["seconds"], xla["timer"], xla["speedup_of_ours"]) == (8.0, "wall", 2.0)
    assert gpu_device.of_calls([("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 4.0)], 2) == pytest.approx([0.003, 0.007])
    with pytest.raises(ValueError, match="3 kernels in 2 calls"):
        gpu_device.of_calls([("a", 1.0)] * 3, 2)


def test_rows_of_the_same_device_and_versions_stay(tmp_path):
    about = {"device": "NVIDIA H100", "versions": {"jax": "1"}}
    path = tmp_path / "rows.json"
    assert gpu_device._earlier(path, about) == []
    path.write_text(json.dumps(about | {"rows": [{"op": "x"}]}))
    assert gpu_device._earlier(path, about) == [{"op": "x"}]
    assert gpu_device._earlier(path, about | {"versions": {"jax": "2"}}) == []


def test_a_wrong_result_shows():
    case = gpu_cases.Case("grouped_matmul", "fwd", "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel_cases.SHAPES, "tiny", kernel_cases.Shape(24, 16, 8, 4, 2))
        operands = gpu_cases.operands(case, "multinomial")
        right = case.work().function("xla")(*operands)
        assert gpu_device.error(case, right, operands) < gpu_device._TOLERANCE
        assert gpu_device.error(case, right.at[5].multiply(1.1), operands) > gpu_device._TOLERANCE
    ids = jnp.array([127, 3])
    assert gpu_device._difference(ids, ids) == 0
    assert gpu_device._difference(ids.at[1].add(1), ids) > gpu_device._TOLERANCE


SCRIPT = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import gpu_process

def answer(asked):
    if asked == "die":
        os._exit(3)
    if asked == "hang":
        time.sleep(60)
    if asked == "fault":
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
    if asked == "full":
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no")
    print("no answer, but a word of some library")
    return {{"pid": os.getpid()}}

gpu_process.serve(answer)
"""


def test_a_process_that_is_lost_is_begun_anew(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(scripts=str(Path(gpu_process.__file__).parent)))
    worker = gpu_process.Worker(str(script), dict(os.environ))
    pids = [worker.ask("x", 30)["pid"], worker.ask("x", 30)["pid"]]
    assert worker.ask("full", 30) == {"raised": "RuntimeError: CUDA_ERROR_OUT_OF_MEMORY: no"}
    pids.append(worker.ask("x", 30)["pid"])
    assert len(set(pids)) == 1
    assert worker.ask("die", 30) == {"raised": "ended its process with code 3"}
    pids.append(worker.ask("x", 30)["pid"])
    assert worker.ask("hang", 0.2) == {"raised": "no answer after 0.2 s"}
    pids.append(worker.ask("x", 30)["pid"])
    assert "ILLEGAL_ADDRESS" in worker.ask("fault", 30)["raised"] and worker.process is None
    assert len({*pids, worker.ask("x", 30)["pid"]}) == 4
    worker.close()


def test_ops_on_ids_are_checked(monkeypatch):
    """On ids that are drawn, not all of one expert."""
    monkeypatch.setitem(kernel_cases.SHAPES, "tiny", kernel_cases.Shape(24, 16, 8, 4, 2))
    case = gpu_cases.Case("low_rank_grouped", "fwd", "tiny")
    operands = gpu_cases.operands(case, "multinomial")
    assert len(np.unique(operands[-1])) > 2
    assert gpu_device.error(case, case.work().function(gpu_device.OURS)(*operands), operands) < gpu_device._TOLERANCE
