"""What XLA makes of a train step: work that it would do again and again, copies that it would make."""

import re

import jax
import numpy as np
import pytest

from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.step import Trainer

pytestmark = pytest.mark.usefixtures("unrolled")


@pytest.fixture(scope="module")
def text(unrolled):
    config = load_config("quickstart:tiny", [("optim.name", "adamw")])
    trainer = Trainer(config, make_mesh(config.mesh, jax.devices()[:1]), config.train.objective.make())
    rows = config.data.batch_size, config.data.seq_len
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions", "domain")
    batch = {name: jax.ShapeDtypeStruct(rows, np.int32) for name in names}
    step = trainer.train_step.lower(trainer.abstract_state(), batch, np.float32(0))
    return step.compile().as_text()


def test_angles_are_computed_once(text):
    """Not in every layer, for queries and keys, forward and backward."""
    assert len(re.findall(r" sine\(", text)) == 1
    assert len(re.findall(r" cosine\(", text)) == 2  # the learning rate's is the other


def test_moments_are_written_in_place(text):
    """A copy first, of twice the weights' memory, is what XLA makes if it may."""
    experts = re.findall(r" copy\(%?(state__opt\S*experts\S*)\)", text)
    assert not experts
    assert "state__opt" in text and "ffn_experts_w_up" in text
