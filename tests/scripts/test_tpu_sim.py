"""The simulator of compiled TPU kernels, on kernels whose traffic and work are known."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "scripts")]

import bench_kernels  # noqa: E402
import tpu_cases  # noqa: E402
import tpu_sim  # noqa: E402

pytest.importorskip("libtpu")


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_copy_moves_each_byte_once(generation):
    figures = tpu_sim.profile_case("tpu_cases:copy", generation)
    assert figures["ok"], figures
    (kernel,) = figures["variants"][""]["kernels"]
    size = 4 * tpu_cases.ROWS * tpu_cases.COLUMNS
    # on tpu7x XLA itself brings the operand to VMEM
    assert kernel["hbm_write"] == size and kernel["hbm_read"] + kernel["vmem_operand_bytes"] == size
    assert kernel["unknown_decisions"] == kernel["unmatched_waits"] == 0
    assert 0.5 < figures["variants"][""]["roofline_fraction"] <= 1


def test_loops_follow_the_operands():
    figures = tpu_sim.profile_case("tpu_cases:multiply_as_often_as_told", "v6e")
    assert figures["ok"], figures
    for name, trips in (("three", 3), ("seven", 7)):
        (kernel,) = figures["variants"][name]["kernels"]
        assert kernel["issued_flops"] == 2 * trips * tpu_cases.BLOCK**3


def test_failures_are_reported():
    figures = tpu_sim.profile_case("tpu_cases:broken", "v5e")
    assert not figures["ok"] and figures["error"] == "NotImplementedError: no such kernel"


def test_less_than_the_least_possible_is_no_result():
    """A simulation that lost the thread must not pass the bars."""
    kernel = {"error": None, "issued_flops": 10, "hbm_read": 100, "hbm_write": 100, "vmem_operand_bytes": 0}
    kernel |= {"cores_cycles": [5], "unknown_decisions": 0, "unmatched_waits": 0}
    variant = {"kernels": [kernel], "useful_flops": 10, "min_bytes": 200, "sim_seconds": 2.0, "roofline_s": 1.0}
    assert bench_kernels._simulated(variant)["over_roofline"] == 2
    assert "issued_over_useful" in bench_kernels._simulated({**variant, "useful_flops": 1000})["error"]
