"""Memory in huge pages, for training on a CPU.

XLA takes a step's temporary memory from malloc in one piece and gives it back after the step. glibc maps such a piece
anew each time, and the kernel fills it page by page: 108,000 faults in a step of the benchmark decoder, 0.2 of its
0.95 CPU seconds. In pages of 2 MB it is 500 faults. glibc asks for them only if told before the process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def _glibc_can() -> bool:
    """The tunable came with glibc 2.35; other C libraries have none."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
    except (AttributeError, ValueError, OSError):
        return False
