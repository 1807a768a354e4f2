"""Which implementation of an op runs: named by the caller, or chosen by platform.

A name either runs or raises; only `None` chooses. The choice falls when the function is *lowered*, through
`jax.lax.platform_dependent`, so a function compiled ahead of time for a TPU on a CPU host gets the TPU branch, and the
branches of other platforms are not emitted at all (tests/pallas_kernels/test_grouped_matmul.py checks both).

A TPU kernel that is named runs on CPU too, in Pallas's interpret mode: for tests. `None` never chooses that.
"""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

logger = logging.getLogger("pallas_kernels")

#: Runs today, on any platform. "reference" is the oracle of the tests, "xla_tiles" is built for CPUs.
AVAILABLE = ("reference", "xla", "xla_tiles", "pallas_tpu")
#: Valid names whose kernels don't exist yet.
PLANNED = ("pallas_gpu",)


def check_implementation(
    op: str, implementation: str | None, shapes: str, tpu_refuses: str | None = None
) -> str | None:
    """Returns `implementation` if it can run. `tpu_refuses`: why the TPU kernel doesn't take these operands.

    Raises NotImplementedError for a kernel that doesn't exist or refuses (naming backend, shape and reason), ValueError
    for an unknown name.
    """
    if implementation is None:
        _log_choice_once(op)
        return None
    if implementation == "pallas_tpu" and tpu_refuses:
        raise NotImplementedError(f"{op}: implementation 'pallas_tpu' is not available for {shapes}: {tpu_refuses}.")
    if implementation in AVAILABLE:
        return implementation
    if implementation in PLANNED:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} is not available for {shapes}: this kernel has not been written "
            f"yet. Available now: {', '.join(AVAILABLE)}, or None to choose by platform."
        )
    known = AVAILABLE + PLANNED
    near = difflib.get_close_matches(str(implementation), known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"{op}: unknown implementation {implementation!r}: did you mean {near!r}? known: {', '.join(known)}, or None."
    )


@functools.cache
def _log_choice_once(op: str) -> None:
    logger.info("%s: implementation=None: 'xla_tiles' when lowered for cpu, 'pallas_tpu' for tpu, else 'xla'", op)


def run(implementation: str | None, table: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    """Calls the named entry of `table`, or, for None, the one for the platform this is being lowered for.

    All entries must return the same shapes and dtypes. Differentiation has to happen outside (a custom_vjp around
    this call): the derivative of a platform switch would carry the residuals of every branch.

    `table` has no "pallas_tpu" where the kernel doesn't take these operands: then None gives a TPU "xla".
    """
    kernel = table.get("pallas_tpu")
    if implementation == "pallas_tpu":
        interpreted = functools.partial(kernel, interpret=True)
        return jax.lax.platform_dependent(*args, cpu=interpreted, default=kernel)
    if implementation is not None:
        return table[implementation](*args)
    tpu = kernel or table["xla"]
    return jax.lax.platform_dependent(*args, cpu=table["xla_tiles"], tpu=tpu, default=table["xla"])
