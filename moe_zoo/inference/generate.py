"""Autoregressive generation with the models' own caches, batched over ragged prompts.

B prompts, S padded prompt length, N new tokens, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.sharding import readable

_BUCKET = 64  # prompt lengths and token counts are rounded up to this: one compilation per bucket


def generate(
    model: nnx.Module,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> list[np.ndarray]:
    """Continues every prompt (int arrays, at least one id each) by up to `max_new_tokens` ids.

    `temperature` 0 takes the most likely token. Sampling keeps the `top_k` most likely tokens and the smallest set
    whose probability reaches `top_p`. A sequence ends at the first of `stop_ids`, which is not returned. Every sequence
    has its own stream of randomness, so its text does not depend on what else is in the batch.

    Raises ValueError for an empty prompt or settings out of range.
    """
    if len(prompts) == 0:
        return []
    if not model.causal:
        name = model.config.router.name
        raise ValueError(f"router {name!r} is not causal: tokens depend on later ones, so text cannot be generated")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt: expected at least one id (the beginning-of-text id will do)")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= 1; got {max_new_tokens}, "
            f"{temperature}, {top_p}, {top_k}"
        )
    S = _round_up(max(len(p) for p in prompts))
    tokens = np.full((len(prompts), S), pad_id, np.int32)
    valid = np.zeros((len(prompts), S), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, S - len(prompt) :], valid[row, S - len(prompt) :] = prompt, True
    graphdef, state = nnx.split(model)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(prompts)))
    # all from the host, where every process of a run has the same
    out = _run(
        graphdef, _round_up(max_new_tokens), top_k, state, tokens, valid, np.asarray(jax.random.key_data(keys)),
        np.asarray(list(stop_ids) or [-1], np.int32), max_new_tokens, np.float32(temperature), np.float32(top_p),
    )  # fmt: skip
    ids, lengths = jax.device_get(out)
    return [ids[row, : lengths[row]] for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graphdef, N, top_k, state, tokens, valid, keys, stops, limit, temperature, top_p):
    model = nnx.merge(graphdef, state)
    keys = jax.random.wrap_key_data(keys)
    B, S = tokens.shape
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
    logits, _, cache = model(tokens, positions=positions, valid=valid, cache=model.init_cache(B, S + N))

    def pick(logits_BV, step):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(sample, (0, 0, None, None, None))(step_keys, logits_BV, temperature, top_p, top_k)

    def more(carry):
        step, _, _, _, done, _ = carry
        return (step < limit) & ~done.all()

    def advance(carry):
        step, ids, lengths, last, done, (cache, position) = carry
        done = done | (last[:, None] == stops).any(-1)
        ids = jax.lax.dynamic_update_index_in_dim(ids, jnp.where(done, 0, last), step, axis=1)
        lengths = lengths + ~done
        logits, _, cache = model(last[:, None], positions=position[:, None], cache=cache)
        return step + 1, ids, lengths, pick(logits[:, -1], step + 1), done, (cache, position + 1)

    start = (
        jnp.int32(0), jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), pick(logits[:, -1], 0),
        jnp.zeros(B, bool), (cache, positions[:, -1] + 1),
    )  # fmt: skip
    _, ids, lengths, *_ = jax.lax.while_loop(more, advance, start)
    return readable(model.mesh, (ids, lengths))


def sample(key, logits_V: Float[Array, "V"], temperature, top_p, top_k: int | None) -> Array:
    """One token id. Filters act on the tempered distribution; ties at a threshold are kept."""
    greedy = jnp.argmax(logits_V)
    scaled = logits_V / jnp.maximum(temperature, 1e-6)
    if top_k is not None and top_k < logits_V.shape[-1]:
        scaled = jnp.where(scaled < jax.lax.top_k(scaled, top_k)[0][-1], -jnp.inf, scaled)
    ordered = jnp.sort(scaled, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
    lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf))
    scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    return jnp.where(temperature == 0, greedy, jax.random.categorical(key, scaled)).astype(jnp.int32)


def _round_up(n: int) -> int:
    return -(-n // _BUCKET) * _BUCKET
