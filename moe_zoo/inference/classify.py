"""A trained classifier as an object that gives logits and what its layers did with every token."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.core.schema import build
from moe_zoo.inference.loaded import read_settings, run_weights
from moe_zoo.models import make_model
from moe_zoo.models.classifier import Classifier
from moe_zoo.models.config import MODELS
from moe_zoo.models.decoder import ModelAux
from moe_zoo.sharding import make_mesh


@dataclasses.dataclass
class Classified:
    """A model with weights and its settings."""

    model: Classifier
    config: Any

    def __call__(self, *, record: bool = False, **fields: Array) -> tuple[Float[Array, "B C"], ModelAux]:
        """Logits and Aux of a batch of fields by name, `images=...`. `record`: as the model's."""
        graphdef, state = nnx.split(self.model)
        return _forward(graphdef, record, state, fields)


def load_classifier(workdir: str | Path, *, mesh=None, step: int | None = None) -> Classified:
    """Opens a run of ours that trained a classifier. `mesh` None: one device; `step` None: the newest.

    Raises CheckpointError when there is nothing to open, ConfigError if it is of another kind.
    """
    settings = read_settings(Path(workdir))["model"]
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    config = build(MODELS.get(settings.get("name", "decoder"), "model.name").Config, settings, "model")
    return Classified(run_weights(Path(workdir), make_model(config, mesh), mesh, step=step), config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(graphdef, record, state, fields):
    # for models that draw at inference too: the same draws in every call
    return nnx.merge(graphdef, state)(fields, record=record, key=jax.random.key(0))
