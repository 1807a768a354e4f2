"""Skipped steps: what is not finite or spikes changes nothing, is counted, and ends the run with a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.core.registry import ConfigError
from moe_zoo.sharding import make_mesh
from moe_zoo.train import guard
from moe_zoo.train.config import load_config
from moe_zoo.train.metrics import flatten
from moe_zoo.train.objective import NextToken, NextTokenConfig
from moe_zoo.train.step import Trainer


class Poisoned(NextToken):
    """The loss times a factor at some steps, {step: factor}."""

    def __init__(self, factors: dict[int, float]):
        super().__init__(NextTokenConfig())
        self.factors = factors

    def loss(self, model, batch, ostate, *, step, **kwargs):
        loss, stats = super().loss(model, batch, ostate, step=step, **kwargs)
        for at, factor in self.factors.items():
            loss = loss * jnp.where(step == at, factor, 1.0)
        return loss, stats


def run(objective, steps, *settings):
    """[(state, metrics line, host statistics)] after each step."""
    config = load_config("deepseek_v3:tiny", [("optim.warmup_steps", "0"), *settings])
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), objective)
    ids = {path: ids for path, _, ids in trainer.abstract.routed()}
    rows = (np.arange(17) * 7 + np.arange(4)[:, None]) % 40
    batch = {
        "tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": np.ones((4, 16)),
        "positions": np.tile(np.arange(16), (4, 1)), "domain": np.zeros((4, 16)),
    }  # fmt: skip
    batch = {k: v.astype(np.int32) for k, v in batch.items()} | {"loss_mask": np.ones((4, 16), bool)}
    state, seen = trainer.init_state(), []
    for _ in range(steps):
        state, stats = trainer.train_step(state, batch, np.float32(0))
        host = jax.device_get(stats)
        seen.append((jax.device_get(state), flatten(host, ids), host))
    return trainer, seen


def unchanged(a, b) -> bool:
    keep = lambda state: {k: v for k, v in state.items() if k not in ("guard", "step")}
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), keep(a), keep(b))
    return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def unwatched():
    """A run in which spikes pass: one at step 1, nan at step 4, infinity at step 6."""
    return run(Poisoned({1: 1e3, 4: np.nan, 6: np.inf}), 9)


def check(seen, skipped: tuple[int, ...]):
    """Exactly these steps changed nothing and were counted, and training went on."""
    states = [state for state, _, _ in seen]
    bad = [step in skipped for step in range(len(seen))]
    assert [unchanged(a, b) for a, b in zip(states, states[1:])] == bad[1:]
    assert [int(line["skipped_steps"]) for _, line, _ in seen] == np.cumsum(bad).tolist()
    assert [int(line["skipped_in_a_row"]) for _, line, _ in seen] == [int(x) for x in bad]
    assert seen[-1][1]["loss"] < seen[0][1]["loss"] and int(states[-1]["step"]) == len(seen)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))


def test_poisoned_steps_change_nothing_training_goes_on_and_a_spike_passes_unwatched(unwatched):
    check(unwatched[1], skipped=(4, 6))


def test_a_spike_changes_nothing_where_spikes_are_watched():
    _, seen = run(Poisoned({4: 1e3}), 7, ("train.guard.spike", "10"), ("train.guard.memory", "3"))
    check(seen, skipped=(4,))


def test_the_mean_norm_is_of_the_steps_that_were_taken():
    config = guard.GuardConfig(spike=3.0, memory=2)
    state, taken = guard.init(), []
    for norm in (1.0, 2.0, 9.0, np.nan, 3.0, 2.0):
        good, state = guard.judge(config, state, jnp.float32(0), jnp.float32(norm))
        taken.append(bool(good))
    assert taken == [True, True, False, False, True, True]
    mean = ((1 + 2) / 2 + 3) / 2  # memory 2: half old, half new
    assert float(state["norm"]) == pytest.approx((mean + 2) / 2)


def test_gradient_norms_are_per_layer_and_the_explanation_names_the_worst_with_its_layer(unwatched):
    trainer, seen = unwatched
    _, line, host = seen[0]
    total = np.sqrt(sum(np.sum(np.square(n)) for n in host["gradient_norms"].values()))
    assert total == pytest.approx(line["grad_norm"], rel=1e-5)
    assert all(np.shape(n) == (len(trainer.names[p]),) or n.ndim == 0 for p, n in host["gradient_norms"].items())
    norms = {path: np.zeros_like(n) for path, n in host["gradient_norms"].items()}
    path = next(p for p in norms if p.endswith("router.kernel"))
    norms[path][-1] = np.nan
    told = guard.explain(7, line | {"skipped_in_a_row": 3}, norms, trainer.names)
    layer = trainer.names[path][-1].split(".")[1]
    assert "\n" not in told and told.startswith("step 7: 3 steps in a row were skipped")
    norms["embed.table"][...] = np.nan
    assert told == guard.explain(7, line | {"skipped_in_a_row": 3}, norms, trainer.names)
    assert f"layers.{layer}.ffn.router.kernel (nan)" in told and f"layer {layer}: " in told and "entropy" in told


def test_a_spike_factor_of_one_or_less_is_refused():
    with pytest.raises(ConfigError, match="train.guard.spike: expected a factor > 1"):
        load_config("quickstart:tiny", [("train.guard.spike", "1")])
