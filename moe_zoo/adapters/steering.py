"""What adapters have to say when a step moves parameters: the seam between a model's adapters and any optimizer.

An entry whose idea is a rule for updates and no loss (SAME) writes `Adapter.steered`, `held`, `refreshed` and `begun`
for one layer. Here they are asked for all stacked layers of a model; where none says anything, nothing is computed.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.core import param as P

Arrays = dict[str, Array]


def steered(model: nnx.Module, values: Arrays, where: str) -> Arrays:
    """`values` (gradients or updates by path) with those changed that adapters steer."""
    new = {}
    for prefix, adapter in _with(model, "steered"):
        own = {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}
        changed = jax.vmap(lambda one, own: one.steered(own, where))(adapter, own)
        new |= {prefix + name: value.astype(own[name].dtype) for name, value in changed.items()}
    return values | new


def held(model: nnx.Module) -> dict[str, Bool[Array, "..."]]:
    """Masks by path, of as many dims as the parameter, of what this step must not move."""
    new = {}
    for prefix, adapter in _with(model, "held"):
        new |= {prefix + name: mask for name, mask in jax.vmap(lambda one: one.held())(adapter).items()}
    return new


def kept(masks: Mapping[str, Array], new, old):
    """`new` with the held numbers of `old`: trees, such as an optimizer's state, whose leaves are found by the path of
    their parameter in the tree and its number of dims.
    """
    if not masks:
        return new

    def one(path, after, before):
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in masks), None)
        fits = name is not None and jnp.ndim(after) == jnp.ndim(masks[name])
        return jnp.where(masks[name], before, after) if fits else after

    return jax.tree_util.tree_map_with_path(one, new, old)


def refreshed(model: nnx.Module, step: Int[Array, ""]) -> Arrays:
    """Values of buffers by path, of adapters whose turn it is at `step`; the others' as they are."""
    new = {}
    for prefix, adapter in _with(model, "refreshed"):
        if every := adapter.refresh_every:
            compute = lambda one: jax.vmap(lambda layer: layer.refreshed())(one)
            names = jax.eval_shape(compute, adapter).keys()
            as_it_is = lambda one, names=names: {name: P.arrays(one)[name] for name in names}
            # the step is the same for all layers: a branch, of which one side is computed
            values = jax.lax.cond(step % every == 0, compute, as_it_is, adapter)
            new |= {prefix + name: value for name, value in values.items()}
    return new


def begun(model: nnx.Module, given: Mapping[str, Array]) -> Arrays:
    """Buffers with which a run begins from `given`, another's values by path; `model` is abstract."""
    new = {}
    for prefix, adapter in _with(model, "begun"):
        own = {name: given.get(prefix + name) for name in P.arrays(adapter)}
        if all(value is not None for value in own.values()):
            there = P.replace(adapter, {name: jnp.asarray(value) for name, value in own.items()})
            new |= {prefix + name: value for name, value in jax.vmap(lambda one: one.begun())(there).items()}
    return new


def _with(model: nnx.Module, method: str) -> Iterator[tuple[str, Adapter]]:
    """(path and a dot, stacked adapter) of every adapter that has such a method of its own."""
    for path, block, _ in model.blocks():
        for name, adapter in block.adapters.items() if block.adapted else ():
            if getattr(type(adapter), method) is not getattr(Adapter, method):
                yield f"{path}.adapters.{name}.", adapter
