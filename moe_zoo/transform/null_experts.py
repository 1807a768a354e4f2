"""A trained top-k model as AdaMoE (arXiv 2406.13233): null experts whose router columns are copies of the true ones.

Each column has as many copies c as asked for, so that a token picks an expert, its c copies, the next expert, ...: with
(K - 1) (c + 1) + 1 picks, its K experts of before. The new model computes what the old one did; training with
`null_load_balance` then moves tokens to fewer or more. (The paper's numbers of nulls and picks beside 8 experts top-2,
(8, 3) and (16, 4), are these.)
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models import ModelConfig
from moe_zoo.models.config import is_routed
from moe_zoo.routing.null_experts import NullExpertsConfig
from moe_zoo.sharding import sharding_of


def add_null_experts(
    loaded: Loaded, copies: int = 1, *, picks_per_token: int | None = None, coef: float = 0.01
) -> Loaded:
    """The model with `copies` null experts for each true one, in every routed layer.

    `picks_per_token` None: as many as leave the model's output as it was. `coef`: of `null_load_balance`, which takes
    the place of `load_balance`. Raises ConfigError for a router whose gates cannot be kept.
    """
    if copies < 1:
        raise ConfigError(f"copies: expected at least 1 null expert for each true one, got {copies}")
    K = _check(loaded.config)
    picks = (K - 1) * (copies + 1) + 1 if picks_per_token is None else picks_per_token
    router = NullExpertsConfig(copies * loaded.config.num_experts, picks, loaded.config.router.config.init_std)
    router.validate("router")
    router.validate_for(loaded.config.num_experts, "router")
    new = dataclasses.replace(loaded, published=None)
    new.replace_router(
        {"name": "null_experts", **dataclasses.asdict(router)}, losses={"null_load_balance": {"coef": coef}}
    )
    values, variables = P.arrays(new.model), P.flat(new.model)
    for path in [path for path in values if path.endswith("router.null_kernel")]:
        columns = jnp.tile(values[path.replace("null_kernel", "kernel")], copies)
        where = sharding_of(values[path].sharding.mesh, variables[path].logical_axes, columns.shape, path)
        values[path] = jax.device_put(columns.astype(values[path].dtype), where)
    new.model = P.replace(new.model, values)
    return new


def _check(config: ModelConfig) -> int:
    """Experts per token of a model whose gates are a softmax over the chosen logits, as AdaMoE's are."""
    if not any(is_routed(kind) for segment in config.segments() for kind in segment.pattern):
        raise ConfigError("null experts go into routed layers, and this model has none; see transform.upcycle")
    if config.router.name != "top_k":
        raise ConfigError(f"null experts are added to a 'top_k' router, this model's is {config.router.name!r}")
    if own := [name for name, settings in config.variants.items() if "router" in settings]:
        raise ConfigError(f"null experts are added to all routers alike, and variant {own[0]!r} has its own")
    c, wrong = config.router.config, []
    if c.score_function == "sigmoid" or (c.score_function == "softmax" and not c.norm_topk_prob):
        wrong.append(f"score_function={c.score_function} with norm_topk_prob={str(c.norm_topk_prob).lower()}")
    for name, plain in (
        ("routed_scaling_factor", 1.0), ("n_group", 1), ("correction_bias", False), ("linear_bias", False),
    ):  # fmt: skip
        if getattr(c, name) != plain:
            wrong.append(f"{name}={getattr(c, name)}")
    if wrong:
        raise ConfigError(
            f"router: gates of null experts are a softmax over the chosen logits, which {', '.join(wrong)} is not"
        )
    return c.num_experts_per_tok
