"""Which implementation of an op runs: named by the caller, or chosen by platform.

A name either runs or raises; only `None` chooses. The choice falls when the function is *lowered*, through
`jax.lax.platform_dependent`, so a function compiled ahead of time for a TPU on a CPU host gets the TPU branch, and the
branches of other platforms are not emitted at all (tests/pallas_kernels/test_grouped_matmul.py checks both).
"""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from pallas_kernels import _gpu_target, _tpu_target

logger = logging.getLogger("pallas_kernels")

#: On any platform. "reference" is the oracle of the tests, "xla_tiles" is built for CPUs (not every op needs it).
AVAILABLE = ("reference", "xla", "xla_tiles")
#: Kernels for one kind of device. Not every op has every one.
KERNELS = ("pallas_tpu", "pallas_gpu", "mosaic_gpu")
#: What None may choose, and what it is lowered for.
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def check_implementation(
    op: str,
    implementation: str | None,
    shapes: str,
    kernels: Mapping[str, str | None] = MappingProxyType({}),
    available: tuple[str, ...] = AVAILABLE,
) -> str | None:
    """Returns `implementation` if it can run.

    `available`: what the op has besides kernels. `kernels` names the kernels that the op has, each with None or the
    reason why it can't take these operands.
    Raises NotImplementedError for a kernel that can't run (naming backend, shape and reason), ValueError for an unknown
    name.
    """
    if implementation is None:
        _log_choice_once(op, available, *kernels.items())
        return None
    if implementation in available:
        return implementation
    if implementation in KERNELS:
        reason = kernels.get(implementation, "this kernel has not been written yet")
        if reason is None:
            return implementation
        others = available + tuple(name for name, why_not in kernels.items() if why_not is None)
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} is not available for {shapes}: {reason}. "
            f"Available now: {', '.join(others)}, or None to choose by platform."
        )
    known = available + KERNELS
    near = difflib.get_close_matches(str(implementation), known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"{op}: unknown implementation {implementation!r}: did you mean {near!r}? known: {', '.join(known)}, or None."
    )


@functools.cache
def _log_choice_once(op: str, available: tuple[str, ...], *kernels: tuple[str, str | None]) -> None:
    """Says what None will run; once per op and reason."""
    cpu = "xla_tiles" if "xla_tiles" in available else "xla"
    given = dict(kernels)
    if _gpu_target.current() is None:
        given.pop("pallas_gpu", None)  # whoever has no GPU need not read of it
    chosen = ""
    for name, platform in _PLATFORMS.items():
        if name in given:
            why_not = given[name]
            chosen += f"{name!r} for {platform}, " if why_not is None else f"'xla' for {platform} ({why_not}), "
    other = "others" if chosen else "any other platform"
    logger.info("%s: implementation=None: %r when lowered for cpu, %s'xla' for %s", op, cpu, chosen, other)


def run(
    implementation: str | None, table: Mapping[str, Callable[..., Any]], *args: Any, takes_batches: bool = False
) -> Any:
    """Calls the named entry of `table`, or, for None, the one for the platform this is being lowered for.

    A Pallas kernel is called with interpret=True where this is lowered for a CPU. None takes "pallas_tpu" on a TPU and
    "pallas_gpu" on an NVIDIA GPU if the table has it.
    Under vmap the batch runs one by one, unless all entries take batches: most kernels and `ragged_dot` don't.
    All entries must return the same shapes and dtypes. Differentiation has to happen outside (a custom_vjp around
    this call): the derivative of a platform switch would carry the residuals of every branch.
    """
    call = functools.partial(_run, implementation, table)
    return call(*args) if takes_batches else jax.custom_batching.sequential_vmap(call)(*args)


def _run(implementation: str | None, table: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    if implementation == "pallas_tpu":
        kernel = table[implementation]
        if _tpu_target.current() is not _tpu_target.UNKNOWN:
            # no switch where it isn't needed: jax cannot lower one for a TPU whose other branch has ordered effects,
            # as an interpreted kernel's callbacks are
            return kernel(*args)
        return jax.lax.platform_dependent(*args, tpu=kernel, cpu=functools.partial(kernel, interpret=True))
    if implementation in ("pallas_gpu", "mosaic_gpu"):
        kernel = table[implementation]
        if _gpu_target.current() is not None:
            return kernel(*args)
        return jax.lax.platform_dependent(*args, cuda=kernel, cpu=functools.partial(kernel, interpret=True))
    if implementation is not None:
        return table[implementation](*args)
    kernels = {platform: table[name] for name, platform in _PLATFORMS.items() if name in table}
    return jax.lax.platform_dependent(*args, cpu=table.get("xla_tiles", table["xla"]), default=table["xla"], **kernels)
