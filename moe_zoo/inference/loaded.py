"""`moe_zoo.load(path)`: a run of ours or a published directory as an object that gives logits and text."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.checkpoints import CheckpointError, Checkpoints, hf
from moe_zoo.core import param as P
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer, load_tokenizer
from moe_zoo.inference.generate import generate
from moe_zoo.losses import LOSSES
from moe_zoo.models import Decoder, ModelAux, ModelConfig
from moe_zoo.models.decoder import per_layer_terms
from moe_zoo.routing import ROUTERS
from moe_zoo.sharding import make_mesh, sharding_of

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RoutedAux(ModelAux):
    """With `return_routing`: `stats` also holds, one array per routed layer in order, "router_logits" [T, E] and where
    tokens choose "router_experts" and "router_gates" [T, K]. T = B * S, padding included.
    """

    @property
    def stats(self) -> dict[str, Any]:
        return super().stats | per_layer_terms(self.layers)


@dataclasses.dataclass(frozen=True)
class Output:
    """`logits` f32[B, S, V]; `aux` holds the routers' losses and statistics of this call."""

    logits: jax.Array
    aux: ModelAux


@dataclasses.dataclass
class Loaded:
    """A model with weights, its settings and its tokenizer. `model` is an NNX module: look inside, change it.

    `tokenizer_spec`: what `load_tokenizer` opened. `published`: the directory and family that it came from, if any.
    """

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    tokenizer_spec: str = "bytes"
    published: hf.Published | None = None

    def __call__(
        self, input_ids, attention_mask=None, decoder_input_ids=None, *, return_routing: bool = False
    ) -> Output:
        """Logits for int ids [B, S]. `attention_mask` [B, S]: 0 marks padding, left or right; positions follow it.

        `return_routing`: what every routed layer did with every token, see `RoutedAux`.
        `decoder_input_ids` belongs to encoder-decoders, and is an error for a model that is a decoder alone.
        """
        if decoder_input_ids is not None:
            raise ValueError(
                f"decoder_input_ids: {type(self.model).__name__} has no encoder; give the whole text as input_ids"
            )
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
        logits, aux = _forward(graphdef, return_routing, state, jnp.asarray(ids, jnp.int32), valid)
        return Output(logits, RoutedAux(aux.losses, aux.layers) if return_routing else aux)

    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 200, **sampling) -> list[str]:
        """The continuation of each prompt as text; see `inference.generate` for the sampling settings."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tok = self.tokenizer
        if tok is None:
            raise CheckpointError("this model has no tokenizer; use inference.generate(loaded.model, ids, ...)")
        # special tokens that a published tokenizer lacks have ids beyond the model's vocabulary
        known = lambda *ids: [i for i in ids if i < self.config.vocab_size]
        ids = [np.concatenate([known(tok.bos_id), tok.encode(p)]).astype(np.int32) for p in prompts]
        pad = known(tok.pad_id, 0)[0]
        new = generate(self.model, ids, max_new_tokens, stop_ids=known(tok.eos_id), pad_id=pad, **sampling)
        return [tok.decode(n) for n in new]

    def replace_router(self, router: str | Mapping[str, Any], *, seed: int = 0, **changes) -> "Loaded":
        """Gives every routed layer another router, in place: a name, or `{"name": ..., **settings}`.

        What keeps its name and shape (a top-k kernel under other settings, say) keeps its values, the rest is drawn
        with `seed`. `changes` are other settings of the model that must change with it, such as `dispatch`. Losses that
        the new router cannot have are dropped. Returns itself.
        """
        given = {"name": router} if isinstance(router, str) else dict(router)
        settings = overlay(to_dict(self.config), {"router": given, **changes})
        cls = build_router(given)
        settings["losses"] = {n: c for n, c in settings["losses"].items() if _fits(LOSSES.get(n), cls)}
        config = build(ModelConfig, settings, "model")
        model, old = Decoder(config, self.model.mesh), P.arrays(self.model)
        if self.model.quantized:
            model.quantize_experts()
        mesh = next(iter(old.values())).sharding.mesh
        put = lambda var, path, value: jax.device_put(value, sharding_of(mesh, var.logical_axes, value.shape, path))
        kept = {n: a for n, a in P.arrays(model).items() if n in old and old[n].shape == a.shape}
        place = lambda var, path, value: old[path] if path in kept else put(var, path, value)
        self.model, self.config = P.materialize(model, seed, place, given={n: old[n] for n in kept}), config
        return self


def build_router(settings: Mapping[str, Any]) -> type:
    """The class of a router's settings."""
    return ROUTERS.get(settings.get("name", ""), "router.name")


def _fits(loss: type, router: type) -> bool:
    return router.decision in loss.decisions and loss.uses in router.provides


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(graphdef, record, state, ids, valid):
    model = nnx.merge(graphdef, state)
    positions = None if valid is None else jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
    logits, aux, _ = model(ids, positions=positions, valid=valid, record=record)
    return logits, aux


def load(path: str | Path, *, mesh=None, dtype=None, weights: str | None = None, step: int | None = None) -> Loaded:
    """Opens a run of ours, a published directory (config.json, safetensors), or online the name of one on the hub.

    `mesh` None: one device. `dtype` None: parameters as they are stored. `weights` "int8": the matrices of a published
    model's routed experts in int8 with a scale per output channel, narrowed while they are read; such a model can be
    used, not trained or saved. `step`: of a run; None is the newest.

    Raises CheckpointError when there is nothing to open or what is there cannot be used.
    """
    folder = Path(path)
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = hf.download(str(path))
    if not hf.is_published(folder):
        if weights is not None:
            raise CheckpointError(
                f"weights={weights!r} is for published directories; `convert.py export {path}` makes one"
            )
        return _load_run(folder, mesh, dtype, step)
    if step is not None:
        raise CheckpointError(f"{folder} is no run of ours and has no steps, got step={step}")
    model, config, published = hf.load(folder, mesh, dtype, weights)
    tokenizer = _tokenizer(folder)
    return Loaded(model, config, tokenizer, str(folder) if tokenizer else "", published)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The directory's own, if it has one that can be opened; a model is of use without."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return load_tokenizer(folder)
    except DataError as error:
        _log.warning("%s", error)
        return None


def _load_run(workdir: Path, mesh, dtype, step: int | None) -> Loaded:
    settings = read_settings(workdir)
    config = build(ModelConfig, settings["model"], "model")
    tokenizer = load_tokenizer(settings["data"]["tokenizer"])
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet; train longer, or lower checkpoint.every")
    if dtype is not None:
        config = dataclasses.replace(config, dtype=hf.compute_dtype(dtype))
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
        kind = value.dtype if dtype is None or isinstance(var, P.Buffer) else jnp.dtype(dtype)
        abstract.setdefault(group, {})[name] = jax.ShapeDtypeStruct(value.shape, kind, sharding=where)
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
