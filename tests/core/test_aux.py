"""Statistics of a union, however it was cut; and what two parts of a layer may both report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core.aux import Aux, Stat, merge_stats, reduce_stacked

VALUES = np.array([3.0, -1.0, 4.0, 1.5, -9.0, 2.6])
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])


def stats_of(part):
    v, w = VALUES[part], WEIGHTS[part]
    return {"sum": Stat.sum(v.sum()), "mean": Stat.mean((v * w).sum(), w.sum()), "max": Stat.max(v.max())}


CUTS = [(slice(0, 1), slice(1, 6)), (slice(0, 4), slice(4, 6)), (slice(0, 3), slice(3, 6))]


@pytest.mark.parametrize("first, second", CUTS)
def test_merged_statistics_are_those_of_the_union(first, second):
    merged, whole = merge_stats(stats_of(first), stats_of(second)), stats_of(slice(None))
    for name in whole:
        np.testing.assert_allclose(merged[name].value(), whole[name].value(), rtol=1e-6)
    np.testing.assert_allclose(merged["mean"].value(), np.average(VALUES, weights=WEIGHTS), rtol=1e-6)
    assert merged["max"].value() == VALUES.max() and merged["max"].reduction == "max"


def test_stacked_statistics_reduce_to_those_of_the_union():
    parts = [stats_of(slice(i, i + 2)) for i in (0, 2, 4)]
    reduced = reduce_stacked(jax.tree.map(lambda *xs: jnp.stack(xs), *parts))
    for name, stat in stats_of(slice(None)).items():
        np.testing.assert_allclose(reduced[name].value(), stat.value(), rtol=1e-6)
        assert reduced[name].reduction == stat.reduction and reduced[name].total.shape == ()


def test_reducing_keeps_the_axes_behind_the_first():
    loads = np.arange(12).reshape(3, 4)
    reduced = reduce_stacked({"load": Stat.sum(loads), "peak": Stat.max(loads)})
    np.testing.assert_array_equal(reduced["load"].value(), loads.sum(0))
    np.testing.assert_array_equal(reduced["peak"].value(), loads.max(0))


def test_an_average_weighs_calls_equally_and_an_empty_mean_is_zero():
    merged = Stat.average(2.0).merge(Stat.average(4.0)).merge(Stat.average(9.0))
    assert merged.value() == 5.0
    assert Stat.mean(0.0, 0.0).value() == 0.0
    assert Stat.mean(0.1, 0.2).value() == pytest.approx(0.5)


def test_union_adds_losses_of_one_name_and_joins_the_rest():
    both = Aux({"z": jnp.float32(1), "a": jnp.float32(2)}, {"t": 1}, {"s": Stat.sum(1)}) | Aux(
        {"z": jnp.float32(4)}, {"u": 2}, {"r": Stat.sum(2)}
    )
    assert {k: float(v) for k, v in both.losses.items()} == {"z": 5.0, "a": 2.0}
    assert both.terms == {"t": 1, "u": 2} and both.stats.keys() == {"s", "r"}
    assert both.total_loss() == 7.0 and Aux().total_loss() == 0.0


@pytest.mark.parametrize("kind", ["terms", "stats"])
def test_union_refuses_two_reports_of_one_name(kind):
    one = Aux(**{kind: {"load": Stat.sum(1)}})
    with pytest.raises(ValueError, match="load"):
        one | one


def test_union_does_not_change_its_sides():
    left = Aux({"z": jnp.float32(1)})
    left | Aux({"z": jnp.float32(2), "y": jnp.float32(3)})
    assert float(left.losses["z"]) == 1 and left.losses.keys() == {"z"}
