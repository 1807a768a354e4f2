"""A parameter is declared once: shape, logical axes, initializer, dtype. No array exists until `materialize`.

Modules are built abstractly (every variable holds a `jax.ShapeDtypeStruct`), then drawn on the host with numpy's
Philox, one stream per *per-layer* parameter name. So initial values do not depend on the mesh, on how layers are
grouped into scanned segments, or on a compiler; and no device ever holds more than its shard.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Buffer(nnx.Variable):
    """State that no gradient touches: balancing biases, moving centres, thresholds. Checkpointed and synchronised."""


class Frozen(nnx.Param):
    """A parameter that is part of the definition and never trained (a random router, an index table)."""


@dataclasses.dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, rng: np.random.Generator, shape) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(self.std)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, rng, shape) -> np.ndarray:
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def __call__(self, rng, shape) -> np.ndarray:
        return rng.uniform(-self.bound, self.bound, shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Identity:
    """`scale` times the identity; of a square matrix."""

    scale: float = 1.0

    def __call__(self, rng, shape) -> np.ndarray:
        return self.scale * np.eye(*shape, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """Values that are given, those of layer `layers[i]` being `values[i]`: an array [layers, *shape]."""

    layers: tuple[int, ...]
    values: np.ndarray = dataclasses.field(compare=False)

    def at(self, name: str) -> Callable:
        """The initializer of the parameter with this per-layer name."""
        row = self.layers.index(int(name.split(".")[1]))
        return lambda rng, shape: self.values[row].reshape(shape)


def fan_in(size: int, scale: float = 1.0) -> Normal:
    """Normal with std = scale / sqrt(size): keeps the variance of `x @ W` at scale^2 times that of x."""
    return Normal(scale / math.sqrt(size))


def param(shape, axes, init, *, dtype=jnp.float32, kind: type = nnx.Param) -> nnx.Variable:
    """Declares a variable. `axes` has one logical axis name (or None) per dimension.

    `kind` is `nnx.Param` (trained), `Frozen` or `Buffer`.
    """
    shape, axes = tuple(shape), tuple(axes)
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    return kind(jax.ShapeDtypeStruct(shape, dtype), logical_axes=axes, init=init)


def flat(model) -> dict[str, nnx.Variable]:
    """Dotted path -> variable, for every variable of the module."""
    return {".".join(map(str, path)): var for path, var in nnx.to_flat_state(nnx.state(model))}


def arrays(model) -> dict[str, jax.Array]:
    """Dotted path -> array (or ShapeDtypeStruct while the model is abstract)."""
    return {name: var.get_value() for name, var in flat(model).items()}


def replace(model, values: dict[str, jax.Array]):
    """A copy of `model` whose variables hold `values` (every path must be there)."""
    graphdef, state = nnx.split(model)
    new = [(path, var.replace(values[".".join(map(str, path))])) for path, var in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(new))


def stack(block, layer_ids: tuple[int, ...]):
    """An abstract copy of `block` whose every variable has a leading `layers` axis, one entry per global layer id."""
    graphdef, state = nnx.split(block)
    new = []
    for path, var in nnx.to_flat_state(state):
        value = var.get_value()
        stacked = jax.ShapeDtypeStruct((len(layer_ids), *value.shape), value.dtype)
        name = ".".join(map(str, path))
        names = tuple(f"layers.{i}.{name}" for i in layer_ids)
        new.append((path, var.replace(stacked, logical_axes=("layers", *var.logical_axes), layer_names=names)))
    return nnx.merge(graphdef, nnx.from_flat_state(new))


def freeze(module, but=None) -> None:
    """Makes every parameter and buffer of the module `Frozen`, in place, but for those of its part `but`: nothing moves
    them.
    """
    spared = set() if but is None else {id(part) for _, part in nnx.iter_modules(but)}
    for _, part in nnx.iter_modules(module):
        if id(part) in spared:
            continue
        for name, var in list(vars(part).items()):
            if isinstance(var, nnx.Variable) and not isinstance(var, Frozen):
                setattr(part, name, Frozen(var.get_value(), **var.get_metadata()))


def layer_names(model) -> dict[str, tuple[str, ...]]:
    """Our stacked path -> one name per layer (`layers.7.ffn.router.kernel`); unstacked variables map to themselves.

    This is the map that importers, exporters and adapters stand on.
    """
    return {path: var.get_metadata().get("layer_names", (path,)) for path, var in flat(model).items()}


def draw(var: nnx.Variable, path: str, seed: int) -> np.ndarray:
    """The initial value of one variable, on the host: layer by layer, each from its own stream."""
    value, names = var.get_value(), var.get_metadata().get("layer_names")
    if names is None:
        return _stream(seed, path, var.init, value.shape).astype(value.dtype)
    out = np.empty(value.shape, value.dtype)
    for i, name in enumerate(names):
        out[i] = _stream(seed, name, var.init, value.shape[1:])
    return out


def materialize(
    model,
    seed: int,
    place: Callable[[nnx.Variable, str, np.ndarray], jax.Array] | None = None,
    given: Mapping[str, Any] | None = None,
):
    """Draws every abstract variable of `model` that is not `given`. `place(var, path, value)` puts it on devices."""
    place, given = place or (lambda var, path, value: jnp.asarray(value)), given or {}
    value = lambda var, path: given[path] if path in given else draw(var, path, seed)
    return replace(model, {path: place(var, path, value(var, path)) for path, var in flat(model).items()})


def _stream(seed: int, name: str, init, shape) -> np.ndarray:
    init = init.at(name) if isinstance(init, ByLayer) else init
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    return np.asarray(init(np.random.Generator(np.random.Philox(key=key)), shape))
