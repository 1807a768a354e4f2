"""Whether a run fits, before it allocates anything."""

import math
import os

import jax

from moe_zoo.core.registry import ConfigError
from moe_zoo.train.step import Trainer


def state_bytes(trainer: Trainer) -> dict[jax.Device, int]:
    """Bytes of weights, moments and buffers on each device of this process. Gradients come on top, and activations."""
    per_device: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(trainer.abstract_state()):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in leaf.sharding.addressable_devices:
            per_device[device] = per_device.get(device, 0) + size
    return per_device


def group_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of all devices together: {"frozen", "trained", "moments"}."""
    state = trainer.abstract_state()
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    frozen = size(state["frozen"]) + size(state["buffers"])
    return {"frozen": frozen, "trained": size(state["trainable"]), "moments": size(state["opt"])}


def check_memory(trainer: Trainer) -> None:
    """Raises ConfigError when weights, moments and gradients alone exceed the memory of a device, or of the host."""
    needed = state_bytes(trainer)
    gradients = sum(math.prod(trainer.shapes[n].shape) * 4 for n in trainer.partition.trainable)
    platform = next(iter(needed)).platform
    if platform == "cpu":  # simulated devices share the host
        here = gradients * len(needed) // trainer.mesh.devices.size
        have, need, where = _host_bytes(), sum(needed.values()) + here, "this host"
    else:
        device = max(needed, key=needed.get)
        have = (device.memory_stats() or {}).get("bytes_limit")
        need, where = needed[device] + gradients // trainer.mesh.devices.size, f"each {device.device_kind}"
    if have is not None and need > have:
        raise ConfigError(
            f"the run needs {need / 2**30:,.1f} GiB for weights, moments and gradients alone, {where} has "
            f"{have / 2**30:,.1f} GiB: fewer or narrower layers or experts, more devices (mesh.fsdp, mesh.expert), or "
            "an optimizer with fewer moments (optim.name)"
        )


def _host_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
