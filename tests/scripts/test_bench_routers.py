"""What a router may cost is stated with a reason, and the benchmark says where it costs more."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_routers  # noqa: E402

from moe_zoo.routing import ROUTERS  # noqa: E402
from moe_zoo.routing.router import CostBound  # noqa: E402


@pytest.mark.parametrize("name", ROUTERS.names())
def test_more_than_usual_is_allowed_for_a_reason(name):
    bound, usual = ROUTERS.get(name).cost, CostBound()
    assert bound.alone >= usual.alone and bound.moved >= usual.moved
    assert bool(bound.why) == (bound != usual)


def test_broken_bounds_are_named():
    row = dict.fromkeys(bench_routers.WHAT, 1.4)
    assert bench_routers.broken({"top_k": {"16": row}, "switch": {"16": row}}) == []
    slow = {"16": row, "64": row | {"moved, both": 1.6}}
    (line,) = bench_routers.broken({"hash": slow, "switch": slow})
    assert line == "hash, E = 64, moved, both: 1.60 x top-k, at most 1.5 is allowed"


def test_gradients_reach_router_experts_and_tokens():
    run = bench_routers.Case("top_k", E=4, batch=2, seq=8, D=8).functions()["moved, both"]
    _, (floats, x) = run()
    leaves = [np.asarray(leaf) for leaf in (*bench_routers.jax.tree.leaves(floats), x)]
    assert len(leaves) == 5 and all(np.abs(leaf).max() > 0 for leaf in leaves)
