"""Mutated settings and checkpoints: an error line or a run, never a traceback, a hang or an allocation out of bounds.

MOE_ZOO_TORTURE=1 (`make torture`) tries a thousand of each; the suite a few dozen.
"""

import contextlib
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_zoo
from moe_zoo.checkpoints import CheckpointError
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.data import DataError
from moe_zoo.models.config import ModelConfig
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import config_from_dict, load_config
from moe_zoo.train.loop import train
from moe_zoo.train.memory import check_memory
from moe_zoo.train.step import Trainer

TORTURE = os.environ.get("MOE_ZOO_TORTURE") == "1"
EXPECTED = (ConfigError, DataError, CheckpointError)
CALM = dict(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)  # fmt: skip
BASES = ["quickstart", "deepseek_v3", "expert_choice", "soft_moe", "rmoe", "remoe", "block_ffn", "hash", "smoe_dropout"]
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, -(10**30), 0.0, -0.5, 1e-300, 1e300, float("nan"),
         float("inf"), "", "x", "none", "1", "moe", "2*moe", "1*dense 1*moe", "999999999*moe", "-3*moe", "bfloat16",
         "float16", "int8", "../../etc", "__import__('os').getcwd()", "é\n", "a" * 5000, [], [1], ["x"], [[]], {},
         {"name": "top_k"}, {"name": "no"}, {"name": 3}, {"x": 1}, {"top_k": {}}]
    ),
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.sampled_from(["top_k", "hash", "soft", "relu"]),
)  # fmt: skip


def leaves(tree, path=()):
    """Every path of a nested dict, sections too."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@st.composite
def mutated(draw):
    """The settings of a run with one to three keys changed, removed or added."""
    tree = json.loads(json.dumps(load_config(f"{draw(st.sampled_from(BASES))}:tiny").to_dict()))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(sorted(leaves(tree))))
        section = tree
        for parent in parents:
            section = section[parent]
        how = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
        if how == "change":
            section[last] = draw(VALUES)
        elif how == "remove":
            del section[last]
        else:
            section[draw(st.text(max_size=6))] = draw(VALUES)
        if not isinstance(tree, dict) or not list(leaves(tree)):
            break
    return tree


def one_line(error: Exception) -> None:
    text = " ".join(str(error).split())
    assert text and len(text) < 12_000, f"an error of {len(text)} characters"


@settings(max_examples=1000 if TORTURE else 60, **CALM)
@given(mutated())
def test_mutated_settings_give_a_line_or_a_step(tree):
    began = time.monotonic()
    try:
        config = config_from_dict(tree)
        trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
        check_memory(trainer)
        B, S = config.data.batch_size, config.data.seq_len
        batch = {name: jax.ShapeDtypeStruct((B, S), jnp.int32) for name in
                 ("tokens", "targets", "segment_ids", "positions", "domain")}  # fmt: skip
        batch["loss_mask"] = jax.ShapeDtypeStruct((B, S), jnp.bool_)
        jax.eval_shape(trainer._train_step, trainer.abstract_state(), batch, jax.ShapeDtypeStruct((), jnp.float32))
    except EXPECTED as error:
        one_line(error)
    if TORTURE:
        jax.clear_caches()  # a thousand traces of different models would fill the memory
    assert time.monotonic() - began < 60, f"took {time.monotonic() - began:.0f} s: {tree}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine.txt").write_text("the experts route tokens to the slots\n" * 400)
    config = load_config(
        "deepseek_v3:tiny", [("data.source", str(folder / "mine.txt")), ("data.seq_len", "16"), ("train.steps", "2"),
                             ("log.tensorboard", "false"), ("log.eval_rows", "4")]
    )  # fmt: skip
    train(config, folder / "run")
    return folder / "run"


@settings(max_examples=1000 if TORTURE else 30, **CALM)
@given(st.data())
def test_mutated_checkpoint_files_give_a_line_or_a_model(run, tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("mutant") / "run"
    shutil.copytree(run, workdir, ignore=shutil.ignore_patterns("pictures", "metrics.jsonl", ".lock"))
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    for _ in range(data.draw(st.integers(1, 3))):
        file = data.draw(st.sampled_from(files))
        if not file.exists():
            continue
        content = bytearray(file.read_bytes())
        how = data.draw(st.sampled_from(["flip", "truncate", "remove", "random", "grow", "swap"]))
        if how == "flip" and content:
            for _ in range(data.draw(st.integers(1, 8))):
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        elif how == "truncate":
            content = content[: data.draw(st.integers(0, max(len(content) - 1, 0)))]
        elif how == "random":
            content = bytearray(data.draw(st.binary(max_size=64)))
        elif how == "grow":
            content += data.draw(st.binary(min_size=1, max_size=64))
        elif how == "swap":
            content = bytearray(data.draw(st.sampled_from(files)).read_bytes()) if file.exists() else content
        if how == "remove":
            file.unlink()
        else:
            file.write_bytes(content)
        files = [f for f in files if f.exists()]
    began = time.monotonic()
    try:
        loaded = moe_zoo.load(workdir)
        assert loaded.config.vocab_size > 0
    except EXPECTED as error:
        one_line(error)
    finally:
        shutil.rmtree(workdir)
        if TORTURE:
            jax.clear_caches()
    assert time.monotonic() - began < 60


def test_nothing_in_settings_is_executed(tmp_path):
    mark = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    base = load_config("quickstart:tiny").to_dict()
    for path in leaves(base):
        tree = json.loads(json.dumps(base))
        *parents, last = path
        section = tree
        for parent in parents:
            section = section[parent]
        section[last] = code
        with contextlib.suppress(*EXPECTED):  # a pattern, a prompt or a path may be any text
            config_from_dict(tree)
    with pytest.raises(EXPECTED):
        build(ModelConfig, {"layers": code}, "model")
    assert not mark.exists()
