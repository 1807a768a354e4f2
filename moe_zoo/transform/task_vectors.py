"""Several fine-tunes of one base as one model, by arithmetic on what each changed: tau_i = theta_i - theta_0.

task arithmetic   Ilharco et al., arXiv 2212.04089    theta_0 + alpha sum_i tau_i; alpha = 1/n averages the models
TIES              Yadav et al., arXiv 2306.01708      the largest of each tau; per number the sign with more weight; the
                                                      mean of those of that sign
DARE              Yu et al., arXiv 2311.03099         numbers dropped at random, the others made up for it
Breadcrumbs       Davari and Belilovsky, 2312.06795   the largest and the smallest of each tensor dropped

A model with adapters is merged first (`transform.merge`). On the host, in float32; what no fine-tune changed is bit for
bit the base's. One published tensor is one tensor here: a layer's matrix, or an expert's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference.loaded import Loaded

Vector = dict[str, np.ndarray]


def task_arithmetic(base: Loaded, tuned: Sequence[Loaded], alpha: float = 0.3) -> Loaded:
    """theta_0 + alpha sum_i tau_i. A negative alpha forgets. Raises ConfigError if a model has other parameters."""
    return _moved(base, tuned, lambda taus: {name: alpha * sum(tau[name] for tau in taus) for name in taus[0]})


def breadcrumbs(
    base: Loaded, tuned: Sequence[Loaded], alpha: float = 0.4, *, keep: float = 0.2, drop_top: float = 0.01
) -> Loaded:
    """Of every tensor of every tau the `drop_top` largest share is dropped, the next `keep` share kept, the rest
    dropped; then as task arithmetic. The two need no new search when a task is added.
    """
    _share(keep=keep, drop_top=drop_top)
    return task_arithmetic(base, _masked(base, tuned, lambda x: middle(x, keep, drop_top)), alpha)


def dare(base: Loaded, tuned: Sequence[Loaded], alpha: float = 1.0, *, density: float = 0.5, seed: int = 0) -> Loaded:
    """Every number of every tau is kept with probability `density` and divided by it; then as task arithmetic."""
    _share(density=density)
    rng = np.random.Generator(np.random.Philox(seed))
    drop = lambda x: np.where(rng.random(x.shape, np.float32) < density, x / np.float32(density), 0)
    return task_arithmetic(base, _masked(base, tuned, drop), alpha)


def ties(base: Loaded, tuned: Sequence[Loaded], alpha: float = 1.0, *, keep: float = 0.2) -> Loaded:
    """Trim: the `keep` share of each whole tau that is largest. Elect: the sign of their sum, number by number, that of
    the majority where it is zero. Merge: the mean of those that are not zero and of that sign.
    """
    _share(keep=keep)

    def merged(taus: list[Vector]) -> Vector:
        taus = [trimmed(tau, keep) for tau in taus]
        total = {name: sum(tau[name] for tau in taus) for name in taus[0]}
        majority = np.sign(sum(int(np.sign(x).sum()) for x in total.values())) or 1
        new = {}
        for name, x in total.items():
            sign = np.where(x == 0, majority, np.sign(x))
            same = [np.where(tau[name] * sign > 0, tau[name], 0) for tau in taus]
            count = sum((s != 0).astype(np.float32) for s in same)
            new[name] = np.float32(alpha) * sum(same) / np.maximum(count, 1)
        return new

    return _moved(base, tuned, merged)


def middle(tau: Float[np.ndarray, "*shape"], keep: float, drop_top: float) -> Float[np.ndarray, "*shape"]:
    """The tensor with all zeroed but the int(keep n) largest that come behind the int(drop_top n) largest."""
    n, size = tau.size, np.abs(tau).ravel()
    first = int(drop_top * n)
    kept = np.argsort(-size, kind="stable")[first : first + int(keep * n)]
    mask = np.zeros(n, bool)
    mask[kept] = True
    return np.where(mask.reshape(tau.shape), tau, 0)


def trimmed(tau: Vector, keep: float) -> Vector:
    """A whole tau with all zeroed but its int(keep n) largest numbers, and those as large as the last of them."""
    size = np.concatenate([np.abs(x).ravel() for x in tau.values()])
    count = int(keep * size.size)
    least = np.partition(size, -count)[-count] if count else np.inf
    return {name: np.where(np.abs(x) >= least, x, 0) for name, x in tau.items()}


def _share(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}: expected a share in [0, 1], got {value}")


def _host(loaded: Loaded) -> dict[str, np.ndarray]:
    if loaded.config.adapted:
        raise ConfigError("a model with adapters has no task vector yet; transform.merge puts them into its weights")
    return {name: np.asarray(array) for name, array in P.arrays(loaded.model).items()}


def _tau(base: Mapping[str, np.ndarray], tuned: Loaded) -> Vector:
    """What fine-tuning changed, of all floats."""
    values = _host(tuned)
    for name, value in base.items():
        if name not in values or values[name].shape != value.shape:
            has = list(values[name].shape) if name in values else "none"
            raise ConfigError(f"{name}: the base has shape {list(value.shape)}, a fine-tune {has}")
    floats = [name for name, value in base.items() if jax.numpy.issubdtype(value.dtype, jax.numpy.floating)]
    return {name: values[name].astype(np.float32) - base[name].astype(np.float32) for name in floats}


def _moved(base: Loaded, tuned: Sequence[Loaded], combine: Callable[[list[Vector]], Vector]) -> Loaded:
    if not tuned:
        raise ConfigError("expected at least one fine-tune of the base, got none")
    old = _host(base)
    change = combine([_tau(old, one) for one in tuned])
    values = P.arrays(base.model)
    moved = {n: _like((old[n].astype(np.float32) + x).astype(old[n].dtype), values[n]) for n, x in change.items()}
    return dataclasses.replace(base, model=P.replace(base.model, values | moved))


def _masked(base: Loaded, tuned: Sequence[Loaded], mask: Callable[[np.ndarray], np.ndarray]) -> list[Loaded]:
    """The fine-tunes with every tensor of what they changed as `mask` makes it."""
    variables = P.flat(base.model)

    def one(tau: Vector) -> Vector:
        return {name: _by_tensor(x, stacked_axes(variables[name].logical_axes), mask) for name, x in tau.items()}

    return [_moved(base, [model], lambda taus: one(taus[0])) for model in tuned]


def stacked_axes(axes: tuple[str | None, ...]) -> int:
    """How many leading axes of an array stand for tensors of their own: layers, and experts."""
    return next((i for i, axis in enumerate(axes) if axis not in ("layers", "expert")), len(axes))


def _by_tensor(x: np.ndarray, lead: int, mask: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    flat = x.reshape(-1, *x.shape[lead:])
    return np.stack([mask(one) for one in flat]).reshape(x.shape)


def _like(array: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.device_put(array, like.sharding)
