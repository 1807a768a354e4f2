"""Adapters onto a loaded model, into its weights, and out again."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.instructions import embed
from moe_zoo.adapters.mos import Pools
from moe_zoo.adapters.targets import AdapterConfig
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay, to_dict
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.sharding import make_mesh, sharding_of


def add_adapters(
    loaded: Loaded,
    adapters: str | Mapping[str, Any],
    *,
    seed: int = 0,
    given: Mapping[str, jax.Array] | None = None,
) -> Loaded:
    """The model with adapters beside its linear layers, its own weights frozen: a name, or `{"name": ..., **settings}`.

    `given`: values by our path instead of those that `seed` draws. Raises ConfigError for a pattern that matches no
    linear layer, with the nearest names, or if there are adapters already.
    """
    if loaded.config.adapted:
        raise ConfigError(
            f"the model has adapters {loaded.config.adapters.name!r} already; merge them first (transform.merge)"
        )
    settings = {"name": adapters} if isinstance(adapters, str) else dict(adapters)
    config = build(ModelConfig, overlay(to_dict(loaded.config), {"adapters": settings}), "model")
    return rebuilt(loaded, config, {**P.arrays(loaded.model), **(given or {})}, seed)


def merge(loaded: Loaded, weights: Sequence[float] | None = None) -> Loaded:
    """The plain model whose weights have the adapters in them. `weights`: a gate for each expert, for all tokens; None:
    there is one expert. Raises ConfigError for a mixture without them: its gates differ from token to token.
    """
    _check(loaded, weights)
    config = build(ModelConfig, overlay(to_dict(loaded.config), {"adapters": {"name": "none"}}), "model")
    gates = None if weights is None else jnp.asarray(weights, jnp.float32)
    values = _changed(loaded, P.arrays(loaded.model), lambda adapter, w_DN: adapter.merged(w_DN, gates))
    return rebuilt(loaded, config, {n: a for n, a in values.items() if ".adapters." not in n})


def unmerge(merged: Loaded, adapted: Loaded, weights: Sequence[float] | None = None) -> Loaded:
    """The inverse of `merge(adapted, weights)`: the merged model's weights without the adapters, and those beside them.

    Within rounding: the base of `adapted` itself is bit for bit what it was. Raises ConfigError for DoRA.
    """
    _check(adapted, weights)
    gates = None if weights is None else jnp.asarray(weights, jnp.float32)
    values = {**P.arrays(adapted.model), **P.arrays(merged.model)}
    values = _changed(adapted, values, lambda adapter, w_DN: adapter.unmerged(w_DN, gates))
    return rebuilt(adapted, adapted.config, values)


def _check(loaded: Loaded, weights: Sequence[float] | None) -> None:
    if not loaded.config.adapted:
        raise ConfigError("the model has no adapters; see transform.add_adapters")
    if loaded.model.quantized and any(".experts.adapters." in name for name in P.arrays(loaded.model)):
        raise ConfigError(
            "merge: experts were narrowed to int8, and what is beside them would be, too; load them whole"
        )
    experts = {
        adapter.num_experts for _, block, _ in adapted_blocks(loaded.model) for adapter in block.each_adapter().values()
    }
    if weights is None and experts != {1}:
        raise ConfigError(
            f"adapters {loaded.config.adapters.name!r} have up to {max(experts)} experts, mixed token by token; give "
            "weights=, one number per expert, to merge them at those"
        )
    if weights is not None and {len(weights)} != experts:
        raise ConfigError(f"weights: {len(weights)} numbers for {' or '.join(map(str, sorted(experts)))} experts")


def adapted_blocks(model: Decoder):
    """(path, stacked block, layer ids) of every block that has adapters."""
    return (found for found in model.blocks() if found[1].adapted)


def _changed(adapted: Loaded, values: Mapping[str, jax.Array], change: Callable) -> dict[str, jax.Array]:
    """`values` with every adapted layer's weight as `change(adapter, w [D, N])` makes it, in float32."""
    new = dict(values)
    for path, block, _ in adapted_blocks(as_lora(adapted).model):
        for name, adapter in block.each_adapter().items():
            w = values[f"{path}.{name}"]
            flat = w.astype(jnp.promote_types(w.dtype, jnp.float32)).reshape(w.shape[0], *adapter.linear.shape)
            new[f"{path}.{name}"] = jax.vmap(change)(adapter, flat).reshape(w.shape).astype(w.dtype)
    return new


def rebuilt(loaded: Loaded, config: ModelConfig, values: Mapping[str, jax.Array], seed: int = 0) -> Loaded:
    """The model of `config` with `values` by path, the rest drawn, where the arrays of `loaded` are."""
    where = next(iter(P.arrays(loaded.model).values())).sharding
    mesh = where.mesh if hasattr(where, "mesh") else make_mesh(devices=jax.local_devices()[:1])
    model = Decoder(config, loaded.model.mesh)
    if loaded.model.quantized:
        model.quantize_experts()
    put = lambda var, path, x: jax.device_put(x, sharding_of(mesh, var.logical_axes, x.shape, path))
    return dataclasses.replace(loaded, model=P.materialize(model, seed, put, values), config=config)


def join_experts(base: Loaded, models: Sequence[Loaded], adapters: str | Mapping[str, Any], *, seed: int = 0) -> Loaded:
    """The base with a mixture whose experts are the one adapter of each of `models`, runs of ours beside that base.

    Where the mixture's router has the shape of theirs side by side, it is theirs (PHATGOOSE's gates); where it follows
    from the experts, it is made of them (Arrow); else it is drawn with `seed`. Smaller ranks are filled up with zeros,
    and a linear layer that a model leaves out has no such expert. Raises ConfigError for models with several experts,
    DoRA, or a mixture whose experts are no LoRAs.
    """
    settings = {"name": adapters} if isinstance(adapters, str) else dict(adapters)
    if not getattr(ADAPTERS.get(settings.get("name", ""), "adapters.name"), "takes_loras", False):
        raise ConfigError(f"adapters: the experts of {settings['name']!r} are no LoRAs of their own")
    found = [_by_layer(model) for model in models]
    if any(
        not isinstance(a, Adapter) or a.num_experts > 1 or hasattr(a, "magnitude") for f in found for a in f.values()
    ):
        raise ConfigError("join_experts: expected plain LoRA, one beside each linear layer of no routed expert")
    names = sorted({f"layers.{layer}.{name}" for one in found for layer, name in one})
    rank = max(adapter.dims[1] for one in found for adapter in one.values())
    settings |= {"num_experts": len(models), "target_modules": names, "r": rank}
    made = add_adapters(base, settings, seed=seed)
    values = P.arrays(made.model)
    for path, block, layers in adapted_blocks(made.model):
        for name, adapter in block.adapters.items():
            prefix = f"{path}.adapters.{name}."
            old = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            rows = [_side_by_side([one.get((layer, name)) for one in found], old) for layer in layers]
            rows = [row | adapter.from_experts(row["a"], row["b"], row["scale"]) for row in rows]
            for key in rows[0]:
                array = np.stack([row[key] for row in rows]).astype(old[key].dtype)
                values[prefix + key] = jax.device_put(array, old[key].sharding)
    made.model = P.replace(made.model, values)
    return made


def average_skills(loaded: Loaded) -> Loaded:
    """The model with plain LoRA whose A and B are the averages of `poly`'s skills: where MHR-mu begins on a new task.

    Averages of A and of B, not of their products. Raises ConfigError for other adapters.
    """
    if loaded.config.adapters.name != "poly":
        raise ConfigError(f"average_skills: expected adapters 'poly', got {loaded.config.adapters.name!r}")
    averaged = lambda n, x: x.mean(1, keepdims=True) if n.endswith((".a", ".b")) else x[:, :1]
    values = {n: averaged(n, x) if ".adapters." in n else x for n, x in P.arrays(loaded.model).items()}
    return rebuilt(loaded, _plain_lora(loaded), values)


def as_lora(loaded: Loaded) -> Loaded:
    """The model whose `mos` adapters are the plain LoRAs of rank r that they amount to; any other as it is."""
    pools = getattr(loaded.model, "adapters", None)
    if not isinstance(pools, Pools):
        return loaded
    values = P.arrays(loaded.model)
    vectors = pools.per_layer()
    for path, block, layers in adapted_blocks(loaded.model):
        for name in block.adapters:
            for key, array in zip(("a", "b"), vectors[name], strict=True):
                values[f"{path}.adapters.{name}.{key}"] = array[np.asarray(layers)][:, None]
    return rebuilt(loaded, _plain_lora(loaded), values)


def describe_experts(loaded: Loaded, instructions: Sequence[str] | Float[Array, "E M"]) -> Loaded:
    """The model whose `glider` adapters know what each expert is for: one instruction each, or its embedding.

    Raises ConfigError if its adapters do not look at instructions, or there is not one for each expert.
    """
    if loaded.model.instruction_size is None:
        raise ConfigError(f"describe_experts: expected adapters 'glider', got {loaded.config.adapters.name!r}")
    old = loaded.model.adapters.embeddings[...]
    texts = all(isinstance(text, str) for text in instructions)
    new = embed(instructions, old.shape[1]) if texts else np.asarray(instructions, np.float32)
    if new.shape != old.shape:
        raise ConfigError(
            f"describe_experts: expected instructions for {old.shape[0]} experts, or embeddings {list(old.shape)}; got "
            f"{list(new.shape)}"
        )
    values = P.arrays(loaded.model) | {"adapters.embeddings": jax.device_put(new.astype(old.dtype), old.sharding)}
    return dataclasses.replace(loaded, model=P.replace(loaded.model, values))


def _plain_lora(loaded: Loaded) -> ModelConfig:
    """The settings with plain LoRA of the same targets, rank and scale."""
    own = {field.name for field in dataclasses.fields(AdapterConfig)}
    settings = {key: value for key, value in to_dict(loaded.config.adapters).items() if key in own}
    return build(ModelConfig, overlay(to_dict(loaded.config), {"adapters": {"name": "lora", **settings}}), "model")


def _by_layer(model: Loaded) -> dict[tuple[int, str], Any]:
    """(layer, linear layer) -> the adapter of that layer alone, where it does anything. Raises ConfigError if none."""
    _check(model, None)
    found = {}
    for _, block, layers in adapted_blocks(as_lora(model).model):
        for name, adapter in block.each_adapter().items():
            for row, layer in enumerate(layers):
                one = jax.tree.map(lambda x, row=row: np.asarray(x[row]), adapter)
                if one.scale[...].any():
                    found[layer, name] = one
    return found


def _side_by_side(experts: Sequence[Adapter | None], old: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """One layer's arrays for a mixture of these, shaped as a layer of `old`: what each expert has, and their routers if
    those are a column each.
    """
    there = {e: P.arrays(adapter) for e, adapter in enumerate(experts) if adapter is not None}
    rows = {key: np.zeros(old[key].shape[1:], np.float32) for key in ("a", "b", "scale")}
    for e, arrays in there.items():
        for key, row in rows.items():
            row[e, : arrays[key].shape[1]] = arrays[key][0]
    column = old["router"].shape[1:-1] if "router" in old else None
    if column and all("router" in arrays and arrays["router"].shape == (*column, 1) for arrays in there.values()):
        rows["router"] = np.zeros(old["router"].shape[1:], np.float32)
        for e, arrays in there.items():
            rows["router"][:, e] = arrays["router"][:, 0]
    return rows
