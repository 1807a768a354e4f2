"""How many tokens may pass each block of a finished model by, searched for on a text (FTP, `depth/genetic.py`).

B batch, S sequence, L layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.depth.genetic import Evolution
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models import ModelConfig
from moe_zoo.transform.adapters import rebuilt


def search_sparsities(
    loaded: Loaded,
    tokens: Int[np.ndarray, "B S"],
    mean: float,
    *,
    segment_ids: Int[np.ndarray, "B S"] | None = None,
    prompt: Bool[np.ndarray, "B S"] | None = None,
    evolution: Evolution | None = None,
    whole: tuple[int, ...] = (0, -1),
    seed: int = 0,
) -> tuple[Loaded, list[float]]:
    """The model with the sparsities, `mean` on average, that move what it says of `tokens` least; and the lowest cost
    of every generation: KL from the whole model, nats per token.

    Its routers decide as they are: first "static" ones, whose sparsities routers are then trained for ("dynamic"), and
    again with those, if one likes: a sparsity is what a router looks at. `prompt`: as in the model's call. `whole`:
    layers that nobody passes by. Raises ConfigError if the model's selectors are not `ftp`.
    """
    if loaded.config.depth.name != "ftp":
        raise ConfigError(f"expected a model with depth 'ftp' (add_selectors), got {loaded.config.depth.name!r}")
    L = loaded.config.num_layers
    graphdef, state = nnx.split(loaded.model)
    seen = {"tokens": tokens, "segment_ids": segment_ids, "prompt": prompt}
    seen["valid"] = None if segment_ids is None else segment_ids > 0
    everybody = {"depth": np.ones((L, len(tokens)), np.int32)}
    teacher = _logits(graphdef, state, seen, everybody)
    one = lambda s_L: float(_apart(graphdef, state, seen, {"depth_sparsity": np.float32(s_L)}, teacher))
    cost = lambda vectors: np.array([one(s_L) for s_L in vectors])
    best, history = (evolution or Evolution()).best(cost, L, mean, whole=whole, seed=seed)
    return set_sparsities(loaded, best), history


def set_sparsities(loaded: Loaded, sparsities: Float[np.ndarray, "L"]) -> Loaded:
    """The model whose `ftp` selectors let that part of the tokens pass each layer by; its routers are as they were."""
    changes = {"depth": {"sparsities": [float(s) for s in sparsities]}}
    config = build(ModelConfig, overlay(to_dict(loaded.config), changes), "model")
    return rebuilt(loaded, config, P.arrays(loaded.model))


def _run(graphdef, state, seen, inputs):
    return nnx.merge(graphdef, state)(**seen, inputs=inputs)[0]


_logits = functools.partial(jax.jit, static_argnums=0)(_run)


@functools.partial(jax.jit, static_argnums=0)
def _apart(graphdef, state, seen, inputs, teacher):
    """The mean of KL(teacher || model) over real tokens."""
    log, target = jax.nn.log_softmax(_run(graphdef, state, seen, inputs)), jax.nn.log_softmax(teacher)
    nats_BS = (jnp.exp(target) * (target - log)).sum(-1)
    valid_BS = jnp.ones(nats_BS.shape) if seen["valid"] is None else seen["valid"]
    return (nats_BS * valid_BS).sum() / valid_BS.sum()
