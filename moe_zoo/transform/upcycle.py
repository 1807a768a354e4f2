"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense model's layers as experts that begin as its copies.

Every expert is the dense network of its layer, the router is drawn anew, everything else is kept. Where the gates of a
token sum to 1 (top-k, renormalised; dropless) the new model computes what the old one did, whatever the router says.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.config import is_routed
from moe_zoo.sharding import sharding_of


def upcycle(
    loaded: Loaded,
    num_experts: int = 8,
    *,
    router: str | Mapping[str, Any] = "top_k",
    layers: str | None = None,
    seed: int = 0,
    **changes,
) -> Loaded:
    """The dense model with `num_experts` copies of its feed-forward networks in routed layers.

    `layers`: which layers are routed, as many as there are ("6*(dense moe)"; the paper routes every second one); None:
    all of them. `seed` draws the routers. `changes`: other settings of the routed layers, such as `losses` or
    `dispatch`. Raises ConfigError if a layer is routed already, or does not fit.
    """
    old = loaded.config
    if routed := [kind for kind in kinds(old) if is_routed(kind)]:
        raise ConfigError(
            f"upcycle: expected a dense model, this one has {len(routed)} routed layers of {len(kinds(old))}"
        )
    config = build(
        ModelConfig,
        overlay(to_dict(old), {
            "layers": re.sub(r"(?<!:)\bdense\b", "moe", old.layers) if layers is None else layers,
            "num_experts": num_experts, "moe_intermediate_size": old.intermediate_size,
            "experts": {"name": "feed_forward", **to_dict(old.mlp)},
            "router": {"name": router} if isinstance(router, str) else dict(router), **changes,
        }),
        "model",
    )  # fmt: skip
    if len(kinds(config)) != len(kinds(old)):
        raise ConfigError(f"layers: {config.layers!r} has {len(kinds(config))} layers, the model has {len(kinds(old))}")
    before = by_layer(loaded.model)
    model, given = Decoder(config, loaded.model.mesh), {}
    mesh = next(iter(P.arrays(loaded.model).values())).sharding.mesh
    names = P.layer_names(model)
    for path, var in P.flat(model).items():
        if ".ffn.router." in path or path.startswith("shared."):
            continue
        value = [copied(before, name, num_experts) for name in names[path]]
        if missing := [name for name, array in zip(names[path], value, strict=True) if array is None]:
            raise ConfigError(f"upcycle: the dense model has nothing to begin {missing[0]} from")
        given[path] = jnp.stack(value) if "layer_names" in var.get_metadata() else value[0]
        if given[path].shape != var.get_value().shape:
            raise ConfigError(
                f"{path}: the dense model's has shape {list(given[path].shape)}, the settings ask for "
                f"{list(var.get_value().shape)}"
            )
    put = lambda var, path, value: jax.device_put(value, sharding_of(mesh, var.logical_axes, value.shape, path))
    return dataclasses.replace(loaded, model=P.materialize(model, seed, put, given), config=config, published=None)


def kinds(config: ModelConfig) -> list[str]:
    """The block kind of every layer."""
    return [kind for segment in config.segments() for kind in segment.pattern * segment.repeats]


def by_layer(model: Decoder) -> dict[str, jax.Array]:
    """Per-layer name -> array, however layers are stacked."""
    values, found = P.arrays(model), {}
    for path, var in P.flat(model).items():
        stacked = "layer_names" in var.get_metadata()
        for i, name in enumerate(P.layer_names(model)[path]):
            found[name] = values[path][i] if stacked else values[path]
    return found


def copied(before: Mapping[str, jax.Array], name: str, num_experts: int) -> jax.Array | None:
    """The dense model's array of this name; for an expert's, one copy for each. None if there is none."""
    if ".ffn.experts." not in name:
        return before.get(name)
    dense = before.get(name.replace(".experts.", "."))
    return None if dense is None else jnp.broadcast_to(dense, (num_experts, *dense.shape))
