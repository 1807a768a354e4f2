"""`moe_zoo.load(workdir)`: a trained run as an object that gives logits and text."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.checkpoints import CheckpointError, Checkpoints
from moe_zoo.core import param as P
from moe_zoo.core.schema import build
from moe_zoo.data.tokenizer import Tokenizer, load_tokenizer
from moe_zoo.inference.generate import generate
from moe_zoo.models import Decoder, ModelAux, ModelConfig
from moe_zoo.sharding import make_mesh, sharding_of


@dataclasses.dataclass(frozen=True)
class Output:
    """`logits` f32[B, S, V]; `aux` holds the routers' losses and statistics of this call."""

    logits: jax.Array
    aux: ModelAux


@dataclasses.dataclass
class Loaded:
    """A model with weights, its settings and its tokenizer. `model` is an NNX module: look inside, change it.

    `tokenizer_spec`: what `load_tokenizer` opened.
    """

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_spec: str = "bytes"

    def __call__(self, input_ids, attention_mask=None) -> Output:
        """Logits for int ids [B, S]. `attention_mask` [B, S]: 0 marks padding, left or right; positions follow it."""
        ids = np.atleast_2d(np.asarray(input_ids))
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids: expected integers [batch, seq], got {ids.dtype} {list(ids.shape)}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(
                f"input_ids: expected ids in [0, {self.config.vocab_size}), got {ids.min()} to {ids.max()}"
            )
        valid = None
        if attention_mask is not None:
            valid = np.atleast_2d(np.asarray(attention_mask)).astype(bool)
            if valid.shape != ids.shape:
                raise ValueError(
                    f"attention_mask: expected the shape of input_ids {list(ids.shape)}, got {list(valid.shape)}"
                )
        graphdef, state = nnx.split(self.model)
        return Output(*_forward(graphdef, state, jnp.asarray(ids, jnp.int32), valid))

    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 200, **sampling) -> list[str]:
        """The continuation of each prompt as text; see `inference.generate` for the sampling settings."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tok = self.tokenizer
        ids = [np.concatenate([[tok.bos_id], tok.encode(p)]).astype(np.int32) for p in prompts]
        new = generate(self.model, ids, max_new_tokens, stop_ids=[tok.eos_id], pad_id=tok.pad_id, **sampling)
        return [tok.decode(n) for n in new]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, ids, valid):
    model = nnx.merge(graphdef, state)
    positions = None if valid is None else jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
    logits, aux, _ = model(ids, positions=positions, valid=valid)
    return logits, aux


def load(workdir: str | Path, *, mesh=None, step: int | None = None) -> Loaded:
    """Opens a run of ours. `step` None: the newest checkpoint. `mesh` None: one device.

    Raises CheckpointError when there is nothing to open: no directory, no settings, no finished checkpoint.
    """
    workdir = Path(workdir)
    settings = read_settings(workdir)
    config = build(ModelConfig, settings["model"], "model")
    tokenizer = load_tokenizer(settings["data"]["tokenizer"])
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet; train longer, or lower checkpoint.every")
    model = Decoder(config, mesh)
    abstract = {}
    groups = {name: group for group, names in checkpoints.meta(step)["groups"].items() for name in names}
    variables = P.flat(model)
    for name, var in variables.items():
        value = var.get_value()
        group = groups.get(name)
        if group is None:
            raise CheckpointError(f"{workdir}: checkpoint {step} lacks {name!r} which its config.json asks for")
        where = sharding_of(mesh, var.logical_axes, value.shape, name)
        abstract.setdefault(group, {})[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
    values = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    return Loaded(P.replace(model, values), config, tokenizer, settings["data"]["tokenizer"])


def read_settings(workdir: Path) -> dict[str, Any]:
    """config.json of a run. Raises CheckpointError if it is not there or not ours."""
    path = workdir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{workdir} is not a run: no config.json in it")
    try:
        settings = json.loads(path.read_text())
        return {"model": settings["model"], "data": settings["data"], **settings}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the settings of a run: {type(error).__name__}: {error}") from error
