"""What XLA makes of a train step: work that it would do again and again, copies that it would make."""

import re

import jax
import numpy as np
import pytest

from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

pytestmark = pytest.mark.usefixtures("unrolled")


def lowered(seed=0):
    config = load_config("quickstart:tiny", [("optim.name", "adamw"), ("train.seed", str(seed))])
    trainer = Trainer(config, make_mesh(config.mesh, jax.devices()[:1]), config.train.objective.make())
    rows = config.data.batch_size, config.data.seq_len
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions", "domain")
    batch = {name: jax.ShapeDtypeStruct(rows, np.int32) for name in names}
    return trainer.train_step.lower(trainer.abstract_state(), batch, np.float32(0))


@pytest.fixture(scope="module")
def step(unrolled):
    return lowered()


@pytest.fixture(scope="module")
def text(step):
    return step.compile().as_text()


def test_runs_that_differ_in_their_seed_share_what_is_compiled(step):
    assert lowered(seed=7).as_text() == step.as_text()


def test_angles_are_computed_once(text):
    """Not in every layer, for queries and keys, forward and backward."""
    assert len(re.findall(r" sine\(", text)) == 1
    assert len(re.findall(r" cosine\(", text)) == 2  # the learning rate's is the other


def test_weights_and_moments_are_written_in_place(text):
    """In the branch of a good step: one array is made for each that changes, and none is copied first."""
    branch = re.search(r'branch_computations=\{%?([\w.]+), %?([\w.]+)\}.*_train_step\)/cond"', text)
    taken = re.search(rf"^%?{re.escape(branch[2])} \([^\n]*\{{\n(.*?)^\}}", text, re.S | re.M)[1]
    shape = "f32[2,4,32,32]"  # three matrices of the experts, with two moments each
    made = [line.strip() for line in taken.splitlines() if f"= {shape}" in line and " get-tuple-element(" not in line]
    assert len(made) == 9, made
    assert all(" fusion(" in line for line in made), made
