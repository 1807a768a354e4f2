"""Every config file: its docstring says what it is for, its presets are valid, and `tiny` trains."""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_zoo.data.embedded import DOMAINS
from moe_zoo.routing import ROUTERS
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import extend, load_config
from moe_zoo.train.metrics import first_non_finite, flatten
from moe_zoo.train.step import Trainer

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_says_what_it_is_for(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for word in ("Command:", f"configs/{path.name}", "Cost:", "Reaches:", "Presets:"):
        assert word in module.__doc__, word
    load_config(str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_tiny_preset_trains_in_one_compilation_and_nan_shows(path):
    """Loss falls over a few steps of one program; poisoned weights reach the metrics and are named."""
    config = load_config(f"{path}:tiny")
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    state = trainer.init_state(np.ones(config.model.vocab_size), domains=DOMAINS)
    B, S = config.data.batch_size, config.data.seq_len
    # a text that repeats: a few steps are enough to see learning
    tokens = np.tile(np.arange(S + 1) % 7 + 97, (B, 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((B, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)), "domain": np.zeros((B, S), np.int32),
        "loss_mask": np.ones((B, S), bool),
    }  # fmt: skip
    losses = []
    for _ in range(12):
        state, stats = trainer.train_step(state, batch, np.float32(0))
        losses.append(float(stats["scalars"]["loss"]))
    assert losses[0] == pytest.approx(math.log(264), abs=0.6) and losses[-1] < losses[0] - 1, losses
    assert trainer.train_step._cache_size() == 1
    ids = {path: ids for path, _, ids in trainer.abstract.blocks()}
    assert first_non_finite(flatten(jax.device_get(stats), ids)) is None
    poisoned = next(name for name in state["trainable"] if name.endswith("w_up"))
    state["trainable"][poisoned] *= np.nan
    _, stats = trainer.train_step(state, batch, np.float32(0))
    assert first_non_finite(flatten(jax.device_get(stats), ids)) == "loss"


def test_every_router_is_one_configs():
    later = [FILES[0].parent / "depth/duo_llm_router.py"]  # of a second stage
    assert {load_config(f"{path}:tiny").model.router.name for path in [*FILES, *later]} == set(ROUTERS.names())


def test_extend_replaces_a_section_whose_name_changes_and_merges_others():
    tree = extend("quickstart:tiny", {"model": {"router": {"name": "switch"}}, "optim": {"b1": 0.8}})
    assert tree["model"]["router"] == {"name": "switch"}
    assert tree["optim"] == {"warmup_steps": 5, "b1": 0.8} and tree["model"]["hidden_size"] == 32
