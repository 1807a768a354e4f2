"""`moe_zoo.load(path)`: a run of ours or a published directory as an object that gives logits and text."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.adapters.instructions import of_each
from moe_zoo.checkpoints import CheckpointError, Checkpoints, hf
from moe_zoo.core import param as P
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer, load_tokenizer
from moe_zoo.inference.chat import Messages, render
from moe_zoo.inference.generate import generate
from moe_zoo.inference.published import generation_settings, start_id
from moe_zoo.inference.text import Writer
from moe_zoo.losses import LOSSES
from moe_zoo.models import Decoder, ModelAux, ModelConfig, make_model
from moe_zoo.models.decoder import per_layer_terms
from moe_zoo.routing import ROUTERS
from moe_zoo.sharding import make_mesh, sharding_of

_log = logging.getLogger(__name__)
_STREAM = 4  # tokens between two calls of `on_text`


@dataclasses.dataclass(frozen=True)
class RoutedAux(ModelAux):
    """With `return_routing`: `stats` also holds, one entry per routed layer, "router_decision" (the `Decision` of
    the router's type), "router_logits" [T, E], and where tokens choose "router_experts" and "router_gates" [T, K].
    T = B * S, padding included. Of each layer that only some tokens go through, "depth_through" i32[B, S], how often
    each token did.
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
        self,
        input_ids,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        *,
        instructions=None,
        return_routing: bool = False,
    ) -> Output:
        """Logits for int ids [B, S]. `attention_mask` [B, S]: 0 marks padding, left or right; positions follow it.

        `return_routing`: what every routed layer did with every token, see `RoutedAux`; an encoder's layers come first.
        `instructions`: as in `inference.generate`.
        `decoder_input_ids`, `decoder_attention_mask` belong to encoder-decoders, which give logits for these, and are
        an error for a model that is a decoder alone.
        """
        if self.pair and decoder_input_ids is None:
            raise ValueError(f"decoder_input_ids: {type(self.model).__name__} gives logits for these; expected ids")
        if not self.pair and not (decoder_input_ids is None and decoder_attention_mask is None):
            raise ValueError(
                f"decoder_input_ids: {type(self.model).__name__} has no encoder; give the whole text as input_ids"
            )
        ids, valid = self._checked(input_ids, attention_mask, "")
        graphdef, state = nnx.split(self.model)
        more = {} if instructions is None else {"instructions": of_each(self.model, instructions, len(ids))}
        if self.pair:
            more |= {"source": ids, "source_valid": valid}
            ids, valid = self._checked(decoder_input_ids, decoder_attention_mask, "decoder_")
            if len(ids) != len(more["source"]):
                raise ValueError(f"decoder_input_ids: expected {len(more['source'])} rows, got {len(ids)}")
        logits, aux = _forward(graphdef, return_routing, state, ids, valid, more)
        return Output(logits, RoutedAux(aux.losses, aux.layers) if return_routing else aux)

    @property
    def pair(self) -> bool:
        """Whether it is an encoder and a decoder."""
        return self.config.num_encoder_layers > 0

    def _checked(self, input_ids, attention_mask, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
        ids = np.atleast_2d(np.asarray(input_ids))
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{kind}input_ids: expected integers [batch, seq], got {ids.dtype} {list(ids.shape)}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(
                f"{kind}input_ids: expected ids in [0, {self.config.vocab_size}), got {ids.min()} to {ids.max()}"
            )
        valid = None
        if attention_mask is not None:
            valid = np.atleast_2d(np.asarray(attention_mask)).astype(bool)
            if valid.shape != ids.shape:
                raise ValueError(
                    f"{kind}attention_mask: expected the shape of {kind}input_ids {list(ids.shape)}, "
                    f"got {list(valid.shape)}"
                )
        return ids.astype(np.int32), valid

    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 200, **how) -> list[str]:
        """The continuation of each prompt as text. `how`, besides the sampling settings of `inference.generate`:

        `stop`: strings that end a text and are not part of it. `on_text(row, piece)`: called with whole characters as
        they come. `published_sampling`: take the settings of generation_config.json that are not given here.

        An encoder-decoder reads the prompts, and what it answers begins with `target` (NLLB: the code of a language).
        Special tokens written in either are special tokens; prompts end with the one that ends texts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tok = self._needs_tokenizer()
        if self.pair:
            return self._answer(prompts, max_new_tokens, **how)
        # special tokens that a published tokenizer lacks have ids beyond the model's vocabulary
        bos = [i for i in (tok.bos_id,) if i < self.config.vocab_size]
        return self._generate(
            [np.concatenate([bos, tok.encode(p)]).astype(np.int32) for p in prompts], max_new_tokens, **how
        )

    def _answer(self, prompts: list[str], max_new_tokens: int, *, target: str = "", **how) -> list[str]:
        tok = self.tokenizer
        encode = getattr(tok, "encode_rendered", tok.encode)
        start = start_id(self.folder) if self.folder else None
        if start is None:
            raise CheckpointError(
                "no decoder_start_token_id, which answers begin with, in generation_config.json or config.json; "
                "use inference.generate(loaded.model, starts, ..., sources=ids)"
            )
        begin = np.concatenate([[start], encode(target)]).astype(np.int32)
        sources = [np.concatenate([encode(prompt), [tok.eos_id]]).astype(np.int32) for prompt in prompts]
        return self._generate([begin] * len(prompts), max_new_tokens, sources=sources, **how)

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int = 512,
        *,
        template: Mapping[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
        **how,
    ) -> str:
        """The assistant's answer to `[{"role": "user", "content": "..."}, ...]`, by the chat template of the tokenizer.

        `template`: variables of the template's own, `{"enable_thinking": False}`. `on_text(piece)`: called with the
        answer as it comes. `how`: as in `generate`.
        """
        tell = None if on_text is None else lambda row, piece: on_text(piece)
        ids = self.chat_ids(messages, **(template or {}))
        return self._generate([ids], max_new_tokens, on_text=tell, **how)[0]

    def chat_ids(self, messages: Messages, **template) -> np.ndarray:
        """The ids that the chat template makes of a conversation."""
        tok, folder = self._needs_tokenizer(), self.folder
        if folder is None or not hasattr(tok, "encode_rendered"):
            raise CheckpointError("this model's tokenizer is bytes, which has no chat template; use generate")
        return tok.encode_rendered(render(folder, messages, **template)).astype(np.int32)

    def _generate(
        self,
        ids,
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] = (),
        on_text=None,
        published_sampling=False,
        **sampling,
    ) -> list[str]:
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: expected strings of at least one character, got {stop!r}")
        tok, published = self._needs_tokenizer(), generation_settings(self.folder)
        known = lambda *ids: [i for i in ids if i < self.config.vocab_size]
        if published_sampling:
            sampling = published["sampling"] | sampling
        sampling["stop_ids"] = known(*{tok.eos_id, *published["stop_ids"], *sampling.get("stop_ids", ())})
        writer = Writer(tok, len(ids), stop, on_text)
        if on_text is not None:
            sampling.setdefault("chunk", _STREAM)
        generate(self.model, ids, max_new_tokens, pad_id=known(tok.pad_id, 0)[0], on_tokens=writer.tokens, **sampling)
        return writer.finish()

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError("this model has no tokenizer; use inference.generate(loaded.model, ids, ...)")
        return self.tokenizer

    @property
    def folder(self) -> Path | None:
        """Where the tokenizer's files are, if it is a published one."""
        if self.published:
            return self.published.folder
        spec = Path(self.tokenizer_spec or "bytes")
        return spec if spec.is_dir() else spec.parent if spec.is_file() else None

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
        config = build(type(self.config), settings, "model")
        model, old = make_model(config, self.model.mesh), P.arrays(self.model)
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
def _forward(graphdef, record, state, ids, valid, more):
    model = nnx.merge(graphdef, state)
    positions = None if valid is None else jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
    logits, aux, _ = model(ids, positions=positions, valid=valid, record=record, **more)
    return logits, aux


def load(path: str | Path, *, mesh=None, dtype=None, weights: str | None = None, step: int | None = None) -> Loaded:
    """Opens a run of ours, a published directory (config.json, safetensors) or one that `moe_zoo.save` wrote, or online
    the name of one on the hub.

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
    if published.family is hf.OURS and published.settings.get("tokenizer") == "bytes":
        return Loaded(model, config, load_tokenizer("bytes"), "bytes", published)
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
    if "name" in settings["model"]:
        raise CheckpointError(
            f"{workdir} is a run of {settings['model']['name']!r}, no model of text: inference.load_classifier opens it"
        )
    config = build(ModelConfig, settings["model"], "model")
    tokenizer = load_tokenizer(settings["data"]["tokenizer"])
    if dtype is not None:
        config = dataclasses.replace(config, dtype=hf.compute_dtype(dtype))
    model = run_weights(workdir, Decoder(config, mesh), mesh, dtype, step)
    return Loaded(model, config, tokenizer, settings["data"]["tokenizer"])


def run_weights(workdir: Path, model: nnx.Module, mesh, dtype=None, step: int | None = None) -> nnx.Module:
    """The abstract `model` with the weights of a run of ours."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet; train longer, or lower checkpoint.every")
    abstract = {}
    groups = {name: group for group, names in checkpoints.meta(step)["groups"].items() for name in names}
    variables = P.flat(model)
    for name, var in variables.items():
        value = var.get_value()
        group = groups.get(name)
        if group is None:
            raise CheckpointError(f"{workdir}: checkpoint {step} lacks {name!r} which its config.json asks for")
        where = sharding_of(mesh, var.logical_axes, value.shape, name)
        kept = dtype is None or isinstance(var, P.Buffer) or not jnp.issubdtype(value.dtype, jnp.floating)
        kind = value.dtype if kept else jnp.dtype(dtype)
        abstract.setdefault(group, {})[name] = jax.ShapeDtypeStruct(value.shape, kind, sharding=where)
    values = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    return P.replace(model, values)


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
