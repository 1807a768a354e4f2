"""One table from logical axis names to mesh axes, and what can go wrong with it, by name."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_zoo.core.registry import ConfigError, nearest

#: Logical axis -> mesh axes. Data, replaceable: a strategy is another table. An axis that is not here is an error.
DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": (),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "qk_norm": (),
    "mlp": ("tensor",),
    "channels": (),
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    "expert_logits": (),
    "adapter": (),
}


def sharding_of(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str, rules: Mapping = DEFAULT_RULES
) -> NamedSharding:
    """Where an array with these logical axes lives.

    Raises:
      ConfigError: an unknown logical axis, two dims of one array on one mesh axis, or a dim that does not divide;
        the message names the array, the dim and both numbers.
    """
    used: dict[str, str] = {}
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is None:
            spec.append(None)
            continue
        if axis not in rules:
            raise ConfigError(f"{name}: unknown logical axis {axis!r}{nearest(axis, rules)}; known: {', '.join(rules)}")
        mesh_axes = tuple(a for a in rules[axis] if mesh.shape[a] > 1)
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ConfigError(f"{name}: dims {used[mesh_axis]!r} and {axis!r} both claim mesh axis {mesh_axis!r}")
            used[mesh_axis] = axis
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            raise ConfigError(
                f"{name}: dim {axis!r} of size {size} does not divide over mesh axes {mesh_axes} of size {parts}; "
                f"sizes that do: {_divisors(size)}"
            )
        spec.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _divisors(size: int, most: int = 64) -> str:
    return ", ".join(str(n) for n in range(1, min(size, most) + 1) if size % n == 0)


def readable(mesh: Mesh | None, tree):
    """Outputs of a jitted function; if the mesh spans processes, whole on every device, so that each can read them."""
    if mesh is None or not mesh.is_multi_process:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def batch_sharding(mesh: Mesh, rules: Mapping = DEFAULT_RULES) -> NamedSharding:
    """Sharding of an array whose first dim is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(rules["batch"])))
