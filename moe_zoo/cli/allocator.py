"""glibc's allocator, set for training on a CPU.

XLA takes a step's temporary memory from malloc in one piece and gives it back after the step. glibc maps such a piece
anew each time, and the kernel clears it page by page: 108,000 faults in a step of the benchmark decoder, 0.2 of its
0.95 CPU seconds. In pages of 2 MB it is 500 faults and 0.07 s. (Kept in the heap it is none, but then the heap comes to
hold such a piece twice or three times.)
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

#: read by glibc when the process starts
_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: what jax reports when a program is compiled
_COMPILED = "/jax/core/compile/backend_compile_duration"


def environment(current: Mapping[str, str]) -> dict[str, str] | None:
    """`current` with the setting added; None where it is there already, or the system has nothing to set."""
    tunables = current.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or sys.platform != "linux" or not _glibc_can():
        return None
    if not _KERNEL.exists() or "[never]" in _KERNEL.read_text():
        return None
    return {**current, "GLIBC_TUNABLES": f"{tunables}:{_TUNABLE}=1".lstrip(":")}


def use() -> None:
    """Starts this process again, under the same id, with the setting. To be called before anything is imported."""
    new = environment(os.environ)
    if new is not None and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], new)


def give_back() -> None:
    """From now on what compiling leaves behind goes back to the system before the program runs: 0.97 -> 0.66 GB in a
    process of the benchmark decoder. In a process that was started with the setting (`use`).
    """
    if _TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        import jax

        jax.monitoring.register_event_duration_secs_listener(_compiled)


def _compiled(event: str, seconds: float, **_) -> None:
    if event == _COMPILED:
        ctypes.CDLL(None).malloc_trim(0)


def _glibc_can() -> bool:
    """It came with glibc 2.35; other C libraries have none."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
    except (AttributeError, ValueError, OSError):
        return False
