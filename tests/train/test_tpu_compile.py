"""A whole train step, compiled for a TPU slice on this host: it holds our kernels, forward and backward."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest

from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra `test`)")


@pytest.fixture(scope="module")
def devices():
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, expert=2)], ids=["one chip", "data 2, expert 2"])
def test_a_train_step_for_v5e_holds_our_kernels(devices, sizes):
    settings = {
        "model.hidden_size": 256, "model.moe_intermediate_size": 256, "model.num_experts": 8, "model.layers": "1*moe",
        "model.dtype": "bfloat16", "model.attention.num_attention_heads": 2,
    }  # fmt: skip
    config = load_config("quickstart:tiny", [(key, str(value)) for key, value in settings.items()])
    mesh = make_mesh(MeshConfig(**sizes), devices if sizes else devices[:1])
    trainer = Trainer(config, mesh, config.train.objective.make())
    shape = (config.data.batch_size, config.data.seq_len)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=trainer.batch_sharding)
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions", "domain")}
    batch["loss_mask"] = array(jnp.bool_)
    progress = jax.ShapeDtypeStruct((), jnp.float32, sharding=trainer.replicated)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the cache cannot load it again: no TPU here
        text = trainer.train_step.lower(trainer.abstract_state(), batch, progress).compile().as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) >= 6, f"{len(calls)} kernels in the program"  # three forward, at least three backward
    assert "ragged" not in text
