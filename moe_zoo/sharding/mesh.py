"""The device mesh: four named axes, any of which may have size 1."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive

#: data: batch only. fsdp: batch and parameters. expert: batch and experts. tensor: heads and hidden widths.
MESH_AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each axis; `data=-1` takes all devices that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def validate(self, path: str) -> None:
        positive(self, path, "fsdp", "expert", "tensor")
        if self.data != -1 and self.data < 1:
            raise ConfigError(
                f"{join(path, 'data')}: expected -1 (all remaining devices) or a number > 0, got {self.data}"
            )


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """The mesh over `devices` (default: all). Raises ConfigError when the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    rest = math.prod(s for s in sizes if s != -1)
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
    if len(devices) % rest:
        raise ConfigError(f"mesh: {shown} needs a multiple of {rest} devices, found {len(devices)}")
    sizes = [len(devices) // rest if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh: {shown} covers {math.prod(sizes)} devices, found {len(devices)}; data=-1 takes all that remain"
        )
    # Auto, not the Explicit default of jax.make_mesh: layers state no sharding of their own
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
