"""What a layer returns besides its output: losses, terms, statistics. Returned, never stowed away.

Statistics state how they add up over tokens, micro-batches and devices, so accumulation cannot change their meaning.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stat:
    """A statistic with its reduction. `total` is additive (sum, mean) or a running maximum (max).

    A mean is `total / weight` where both add up: the mean over a union is the mean of the union, not a mean of means.
    """

    total: jax.Array
    weight: jax.Array | None = None
    reduction: str = dataclasses.field(default="sum", metadata={"static": True})

    @classmethod
    def sum(cls, value) -> "Stat":
        return cls(jnp.asarray(value), None, "sum")

    @classmethod
    def mean(cls, total, weight) -> "Stat":
        return cls(jnp.asarray(total), jnp.asarray(weight), "mean")

    @classmethod
    def average(cls, value) -> "Stat":
        """A per-call number that is averaged over calls with equal weight."""
        value = jnp.asarray(value)
        return cls(value, jnp.ones(value.shape, value.dtype), "mean")

    @classmethod
    def max(cls, value) -> "Stat":
        return cls(jnp.asarray(value), None, "max")

    def merge(self, other: "Stat") -> "Stat":
        if self.reduction == "max":
            return Stat(jnp.maximum(self.total, other.total), None, "max")
        weight = None if self.weight is None else self.weight + other.weight
        return Stat(self.total + other.total, weight, self.reduction)

    def value(self):
        """The statistic itself; an empty mean is 0."""
        if self.reduction != "mean":
            return self.total
        # where, not max(): a weight below 1 is legitimate (weighted means) and must not be rounded up
        return self.total / jnp.where(self.weight == 0, 1, self.weight)


def is_stat(x) -> bool:
    """For `jax.tree.map(..., is_leaf=is_stat)`."""
    return isinstance(x, Stat)


def merge_stats(a, b):
    """Merges two equal trees of Stats leaf by leaf."""
    return jax.tree.map(lambda x, y: x.merge(y), a, b, is_leaf=is_stat)


def reduce_stacked(stats):
    """A tree of Stats whose leaves have a leading axis of micro-batches -> the tree merged over that axis."""

    def one(stat: Stat) -> Stat:
        if stat.reduction == "max":
            return Stat(stat.total.max(0), None, "max")
        return Stat(stat.total.sum(0), None if stat.weight is None else stat.weight.sum(0), stat.reduction)

    return jax.tree.map(one, stats, is_leaf=is_stat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """`losses`: scalars that add up over layers, coefficients applied. `terms`: differentiable arrays for objectives
    that are not a sum over layers. `stats`: name -> Stat, no gradient.
    """

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    terms: dict[str, Any] = dataclasses.field(default_factory=dict)
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "Aux") -> "Aux":
        """Union. A loss of the same name adds; a term or statistic of the same name is a bug."""
        clash = (self.terms.keys() & other.terms.keys()) | (self.stats.keys() & other.stats.keys())
        if clash:
            raise ValueError(f"two parts of one layer report the same name: {sorted(clash)}")
        losses = dict(self.losses)
        for name, value in other.losses.items():
            losses[name] = losses[name] + value if name in losses else value
        return Aux(losses, {**self.terms, **other.terms}, {**self.stats, **other.stats})

    def total_loss(self) -> jax.Array:
        return sum(self.losses.values(), jnp.zeros((), jnp.float32))
