"""Which GPU a kernel is being compiled for: the few numbers that tile formulas need.

Asked while tracing, like `_tpu_target`: the kind comes from the mesh in use, also ahead of time on a host without a
GPU (`jax.sharding.use_abstract_mesh` with an `AbstractDevice`), and otherwise from the default device. Where neither is
a GPU there is no target, and no implementation is chosen for one: jax cannot lower a kernel for a GPU it knows nothing
of.
"""

import dataclasses
import re

import jax

KIB = 1024
_PLATFORMS = ("gpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Target:
    """One device as a kernel sees it.

    capability: compute capability, 90 for 9.0.
    num_cores: streaming multiprocessors.
    shared_bytes: shared memory that one block may have.
    """

    capability: int
    num_cores: int
    shared_bytes: int

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether tensor cores read their operands from shared memory; otherwise registers must hold them, too."""
        return self.capability in (90, 100, 103)


#: compute capability -> shared memory of a block. Others: what the smallest of them has.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
#: Kinds of an abstract device. Longer names first.
_KINDS = {
    "GB200": 100, "B200": 100, "GB300": 103, "B300": 103, "GH200": 90, "H100": 90, "H200": 90, "A100": 80, "A30": 80,
    "A10": 86, "L40": 89, "L4": 89, "RTX 4090": 89, "RTX PRO": 120, "T4": 75,
}  # fmt: skip
_KIND = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _KINDS), key=len, reverse=True)) + r")")
#: What interpreted kernels, and kernels of GPUs of an unknown kind, are made for.
SMALLEST = Target(80, 108, 99 * KIB)


def current() -> Target | None:
    """The target of the trace at hand; None if it is not known to be for an NVIDIA GPU."""
    abstract, default = jax.sharding.get_abstract_mesh().abstract_device, jax.config.jax_default_device
    if abstract is not None and abstract.platform not in _PLATFORMS:
        return None
    default = jax.devices()[0] if default is None or isinstance(default, str) else default
    if abstract is None and default.platform not in _PLATFORMS:
        return None
    kind = default.device_kind if abstract is None else abstract.device_kind
    cores = getattr(default, "core_count", None) if abstract is None else abstract.num_cores
    if kind == default.device_kind:
        capability = _number(str(getattr(default, "compute_capability", "")))
    else:
        named = _KIND.search(kind)
        capability = _KINDS[named[1]] if named else SMALLEST.capability
    if capability is None:  # not of NVIDIA
        return None
    return of(capability, cores or SMALLEST.num_cores)


def of(capability: int, num_cores: int) -> Target:
    """The target of this compute capability."""
    return Target(capability, num_cores, _SHARED_KIB.get(capability, SMALLEST.shared_bytes // KIB) * KIB)


def _number(capability: str) -> int | None:
    match = re.fullmatch(r"(\d+)\.(\d)", capability)
    return int(match[1] + match[2]) if match else None
