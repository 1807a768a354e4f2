"""Which TPU a kernel is being compiled for: the few numbers that tile formulas need.

Asked while tracing. The device kind comes from the mesh in use (`jax.set_mesh`, `jax.shard_map`,
`jax.sharding.use_abstract_mesh`), which also works when a function is compiled ahead of time on a host without a TPU,
and otherwise from the default device. On a host without a TPU and without a mesh the numbers of `UNKNOWN` are used:
kernels then still run on every generation from v5e on, with tiles that fit the smallest of them.
"""

import dataclasses
import functools
import logging

import jax

logger = logging.getLogger("pallas_kernels")

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """One device as a program sees it.

    num_cores: TensorCores that one program runs on (2 on v4 and v5p, which fuse theirs).
    vmem_bytes: vector memory per core.
    mxu_size: rows and columns of a matrix unit.
    macs_per_cycle: bf16 multiply-adds of all matrix units of a core.
    bytes_per_cycle: HBM traffic per core in the same clock, by the vendor's figures.
    mxu_accumulates: matrix units add up partial products in buffers of their own.
    """

    name: str
    num_cores: int
    vmem_bytes: int
    mxu_size: int
    macs_per_cycle: int
    bytes_per_cycle: float
    mxu_accumulates: bool = False


_V4 = Target("v4", 2, 16 * MIB, 128, 4 * 128 * 128, 586)
_V5E = Target("v5e", 1, 128 * MIB, 128, 4 * 128 * 128, 545)
_V5P = Target("v5p", 2, 64 * MIB, 128, 4 * 128 * 128, 703)
_V6E = Target("v6e", 1, 128 * MIB, 256, 4 * 256 * 256, 937)
_TPU7X = Target("tpu7x", 1, 64 * MIB, 256, 4 * 256 * 256, 1677, mxu_accumulates=True)
_BY_KIND = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
}
#: What every generation from v5e on can run.
UNKNOWN = Target("unknown TPU", 1, 64 * MIB, 128, 4 * 128 * 128, 545)


def current() -> Target:
    """The target of the trace at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind, num_cores = (None, None) if device is None else (device.device_kind, device.num_cores)
    if device is None:
        default = jax.config.jax_default_device
        default = jax.devices()[0] if default is None or isinstance(default, str) else default
        if default.platform == "tpu":
            kind, num_cores = default.device_kind, default.num_cores
    target = _BY_KIND.get(kind)
    if target is None:
        _log_unknown_once(kind)
        return UNKNOWN
    # A chip of two cores may also be driven as two devices of one core each.
    return dataclasses.replace(target, num_cores=num_cores or target.num_cores)


@functools.cache
def _log_unknown_once(kind: str | None) -> None:
    logger.info("TPU kernels: device kind %s: tiles for any TPU from v5e on (see jax.set_mesh for a chosen one)", kind)
