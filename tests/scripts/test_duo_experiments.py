"""What the experiment of big and small networks reckons with: windows, shares, the best fixed pattern, the spread."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import duo_experiments as experiments  # noqa: E402

from moe_zoo.core import param as P  # noqa: E402
from moe_zoo.inference import Loaded  # noqa: E402
from moe_zoo.models import Decoder  # noqa: E402
from moe_zoo.transform import patterns  # noqa: E402


@dataclasses.dataclass
class Documents:
    """As much of a corpus as windows are drawn from."""

    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray:
        return 1000 * i + np.arange(self.lengths[i])


def test_windows_lie_within_documents_and_shuffled_targets_are_the_same_ones():
    random, S = np.random.default_rng(0), experiments.LENGTH
    text = experiments.Text.drawn(Documents((S, S + 1, 5, 3 * S)), 6, random)
    assert text.tokens.shape == text.targets.shape == (6, S)
    np.testing.assert_array_equal(text.targets, text.tokens + 1)
    assert set((text.tokens[:, 0] // 1000).tolist()) == {1, 3}  # the first is too short by the last target
    other = text.shuffled(random)
    np.testing.assert_array_equal(other.tokens, text.tokens)
    np.testing.assert_array_equal(np.sort(other.targets, None), np.sort(text.targets, None))
    assert (other.targets != text.targets).mean() > 0.9


def test_lines_say_where_big_networks_are():
    routes = np.ones((2, 8, 4), np.int8)
    routes[:, :2, 1] = routes[0, 6, 3] = 0  # the first quarter at layer 1, one token of the last quarter at layer 3
    said = experiments.line(np.full((2, 8), 1.5), routes)
    assert said == pytest.approx({
        "nats": 1.5, "big": 5 / 64, "mean layer": (4 * 1 + 3) / 5, "first quarter": 1 / 4, "last quarter": 1 / 16,
    })  # fmt: skip
    assert set(experiments.line(np.zeros(3), np.ones(4, np.int8))) == {"nats", "big"}


def test_the_best_fixed_pattern_and_the_spread_follow_from_the_losses(monkeypatch):
    monkeypatch.setattr(experiments, "LAYERS", 2)  # none big, one, the other, both
    losses = np.array([[3.0, 1.0], [2.0, 1.0], [0.0, 4.0], [5.0, 5.0]])[:, None]
    assert experiments.best_fixed(losses, np.array([0, 2])) == 0 and experiments.best_fixed(losses, np.arange(3)) == 1
    said = experiments.spread(losses)
    assert said["mean of patterns"] == 21 / 8 and said["oracle apart"] == said["1 big"] == 0.5
    assert said["gain"] == 21 / 8 - 0.5
    assert said["deviation"] == pytest.approx((np.std([3, 2, 0, 5]) + np.std([1, 1, 4, 5])) / 2)


def test_both_networks_of_the_noisy_control_are_the_big_one(monkeypatch):
    assert len(patterns(experiments.LAYERS)) == 64
    monkeypatch.setattr(experiments, "LAYERS", 1)
    config = experiments.base_config("embedded", 0).model
    base = Loaded(P.materialize(Decoder(config), 0), config, None)
    clean, big = (experiments.with_noise(base, size, np.random.default_rng(0)) for size in (0.0, 0.5))
    was, same, noisy = (P.arrays(loaded.model) for loaded in (base, clean, big))
    assert same.keys() == was.keys()
    for path in was:
        np.testing.assert_array_equal(same[path], was[path.replace(".small.", ".big.")])
        inside = ".experts." in path
        assert inside == bool((np.asarray(noisy[path]) != np.asarray(same[path])).any())
    assert experiments.router_config(experiments.base_config("embedded", 0)).train.objective.name == "global_budget"
