"""Autoregressive generation with the models' own caches, batched over ragged prompts.

One prefill, then decoding in chunks of tokens per dispatch. Shapes are bucketed: prompts and caches are rounded up to
powers of two and their halves in between, so that another prompt compiles only if its bucket is new.

B prompts, S padded prompt length, L cache length, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_zoo.adapters.instructions import of_each
from moe_zoo.inference.sampling import Sampling, draw
from moe_zoo.sharding import readable

_SMALLEST = 32  # bucket
_CHUNK = 16  # most tokens per dispatch
_STOPS = 8  # ids that end a sequence are padded to a multiple of this
_APART = 2**30  # bytes of weights that a CPU copies once per dispatch, so as not to copy them for every token


def generate(
    model: nnx.Module,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    on_tokens: Callable[[int, np.ndarray], bool | None] | None = None,
    chunk: int = _CHUNK,
    instructions: str | Sequence[str] | np.ndarray | None = None,
    sources: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Continues every prompt (int arrays, at least one id each) by up to `max_new_tokens` ids.

    Adapters that act for the first tokens only (`Decoder.adapted_tokens`) hand over to the base, which reads the text
    so far anew: keys and values that the adapters had a part in are not its own.

    `temperature`, `top_k`, `top_p`, `min_p`: see `Sampling`. A sequence ends at the first of `stop_ids`, which is not
    returned; the call ends when all have. Every sequence has its own stream of randomness, so its text does not depend
    on what else is in the batch.

    `on_tokens(row, ids)` receives each sequence's new ids while the rest is still to come, at most `chunk` (1 to 16)
    at a time; returning True ends that sequence. `sources`: of an encoder-decoder, what it reads, one per prompt; it is
    read once.

    `instructions`: what each sequence asks for, a text or its embedding, for adapters that route by it (Glider).

    Raises ValueError for an empty prompt or settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    if len(prompts) == 0:
        return []
    _check(model, prompts, max_new_tokens, chunk, sources)
    source = () if sources is None else _in_bucket(sources, pad_id, left=False)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(prompts)))
    stops = [*stop_ids, *[-1] * (-len(stop_ids) % _STOPS or _STOPS * (not stop_ids))]
    # all from the host, where every process of a run has the same
    how = jax.device_get(sampling.arrays(model.config.vocab_size))
    how |= {"keys": np.asarray(jax.random.key_data(keys)), "stops": np.asarray(stops, np.int32)}
    how |= {} if instructions is None else {"instructions": of_each(model, instructions, len(prompts))}
    rows = _Rows(len(prompts), set(stop_ids), on_tokens)
    adapted = max_new_tokens if model.adapted_tokens is None else min(model.adapted_tokens, max_new_tokens)
    if adapted:
        _write(model, prompts, rows, 0, adapted, pad_id, chunk, how, source)
    if adapted < max_new_tokens and not rows.done.all():
        texts = [np.concatenate([prompt, *parts]) for prompt, parts in zip(prompts, rows.parts)]
        _write(model.without_adapters(), texts, rows, adapted, max_new_tokens, pad_id, chunk, how)
    return [np.concatenate(parts).astype(np.int32) for parts in rows.parts]


def _write(model, prompts, rows: "_Rows", begin: int, end: int, pad_id: int, chunk: int, how, source=()) -> None:
    """New tokens number `begin` to `end` of every row, behind `prompts`, which hold those before."""
    tokens, valid = _in_bucket(prompts, pad_id, left=True)
    graphdef, state = nnx.split(model)
    L = bucket(tokens.shape[1] + end - begin)
    first, carry = _prefill(graphdef, L, state, tokens, valid, np.int32(begin), how, source)
    rows.take(jax.device_get(first))
    left = end - begin - 1
    while left and not rows.done.all():
        (ids, count), carry = _decode(graphdef, state, carry, rows.done, np.int32(min(left, chunk)), how)
        ids, count = jax.device_get((ids, count))
        rows.take(ids[:, :count])
        left -= min(left, chunk)


def bucket(n: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: at most a third is wasted."""
    power = _SMALLEST
    while power < n:
        power *= 2
    return power * 3 // 4 if power > _SMALLEST and n <= power * 3 // 4 else power


def _in_bucket(texts: Sequence[np.ndarray], pad_id: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which are no padding) [B, S], padded on the left or on the right."""
    B, S = len(texts), bucket(max(len(text) for text in texts))
    ids, valid = np.full((B, S), pad_id, np.int32), np.zeros((B, S), bool)
    for row, text in enumerate(texts):
        at = slice(S - len(text), S) if left else slice(len(text))
        ids[row, at], valid[row, at] = text, True
    return ids, valid


class _Rows:
    """On the host: what every sequence has so far, and which have ended."""

    def __init__(self, B: int, stops: set[int], on_tokens):
        self.parts = [[np.zeros(0, np.int32)] for _ in range(B)]
        self.done = np.zeros(B, bool)
        self._stops, self._on_tokens = stops, on_tokens

    def take(self, ids_BC: np.ndarray) -> None:
        for row in np.flatnonzero(~self.done):
            new = ids_BC[row]
            ends = [i for i, token in enumerate(new) if int(token) in self._stops]
            if ends:
                new, self.done[row] = new[: ends[0]], True
            if len(new):
                self.parts[row].append(new)
                if self._on_tokens is not None and self._on_tokens(int(row), new):
                    self.done[row] = True


def _check(model, prompts, max_new_tokens: int, chunk: int, sources) -> None:
    if (sources is None) == bool(model.config.num_encoder_layers):
        what = "reads a source for every prompt" if sources is None else "has no encoder that reads sources"
        raise ValueError(f"sources: {type(model).__name__} {what}")
    if sources is not None and (len(sources) != len(prompts) or any(len(source) == 0 for source in sources)):
        raise ValueError(f"sources: expected {len(prompts)} of at least one id, one per prompt; got {len(sources)}")
    if not model.causal:
        name = model.config.router.name
        raise ValueError(f"router {name!r} is not causal: tokens depend on later ones, so text cannot be generated")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt: expected at least one id (the beginning-of-text id will do)")
    if max_new_tokens < 1 or not 1 <= chunk <= _CHUNK:
        raise ValueError(f"expected max_new_tokens >= 1, 1 <= chunk <= {_CHUNK}; got {max_new_tokens}, {chunk}")


def _pick(logits_BSV, step, how):
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(how["keys"]), step)
    return draw(keys_B, logits_BSV[:, -1], how)


def _asked(how) -> dict:
    """What the model is told in every call besides its tokens."""
    return {name: how[name] for name in ("instructions",) if name in how}


def _merged(graphdef, state):
    """The model, its layers apart where that pays."""
    model = nnx.merge(graphdef, state)
    alone = model.mesh is None or model.mesh.size == 1
    if alone and jax.default_backend() == "cpu" and sum(x.nbytes for x in jax.tree.leaves(state)) <= _APART:
        model.set_layers_apart()
    return model


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(graphdef, L, state, tokens, valid, begin, how, source):
    """(new id number `begin` [B, 1], what decoding goes on with)."""
    model = _merged(graphdef, state)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
    cache = model.init_cache(tokens.shape[0], L, *source)
    logits, _, cache = model(tokens, positions=positions, valid=valid, cache=cache, last=True, **_asked(how))
    first = _pick(logits, begin, how)
    return readable(model.mesh, first[:, None]), (begin + 1, first, positions[:, -1] + 1, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graphdef, state, carry, done, limit, how):
    """((ids [B, 16], how many of them are new), carry): up to `limit` more ids, fewer if all sequences end."""
    model = _merged(graphdef, state)

    def more(loop):
        i, _, done, _ = loop
        return (i < limit) & ~done.all()

    def advance(loop):
        i, ids, done, (step, last, position, cache) = loop
        logits, _, cache = model(last[:, None], positions=position[:, None], cache=cache, **_asked(how))
        last = _pick(logits, step, how)
        ids = jax.lax.dynamic_update_index_in_dim(ids, last, i, axis=1)
        done = done | (last[:, None] == how["stops"]).any(-1)
        return i + 1, ids, done, (step + 1, last, position + 1, cache)

    ids = jnp.zeros((done.shape[0], _CHUNK), jnp.int32)
    i, ids, _, carry = jax.lax.while_loop(more, advance, (jnp.int32(0), ids, done, carry))
    return readable(model.mesh, (ids, i)), carry
