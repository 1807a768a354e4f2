"""glibc's allocator, set for training on a CPU.

XLA takes a step's temporary memory from malloc in one piece and gives it back after the step. glibc maps such a piece
anew each time, and the kernel clears it page by page: 108,000 faults in a step of the benchmark decoder, 0.2 of its
0.95 CPU seconds. In pages of 2 MB it is 500 faults and 0.07 s. If the piece stays in the heap it is none. One heap for
all threads, and compiling's memory given back before the first step, keep the peak where it was.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

#: read by glibc when the process starts
_TUNABLES = {"glibc.malloc.hugetlb": "1", "glibc.malloc.arena_max": "1"}
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# mallopt's names for: free memory at the end that goes back to the kernel, pieces that are mapped on their own
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MMAP_MAX = 65536  # of the latter, as it is if nobody sets it
#: only where there is room: what other pieces lie in between is then held by the process as well
_ROOM = 8
#: Free memory below a step's own. malloc takes a new piece from the smallest free one that it fits in: from here, not
#: from the step's, which would be too small the next time. Untouched, it is no memory.
_POOL = 1 << 26
#: what jax reports when a program is about to be compiled, and when it is
_BEFORE = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_AFTER = "/jax/core/compile/backend_compile_duration"


def environment(current: Mapping[str, str]) -> dict[str, str] | None:
    """`current` with the settings added; None where they are there already, or the system has nothing to set."""
    tunables = current.get("GLIBC_TUNABLES", "")
    if _set(tunables) or sys.platform != "linux" or not _glibc_can():
        return None
    if not _KERNEL.exists() or "[never]" in _KERNEL.read_text():
        return None
    added = ":".join(f"{name}={value}" for name, value in _TUNABLES.items() if name not in tunables)
    return {**current, "GLIBC_TUNABLES": f"{tunables}:{added}".lstrip(":")}


def use() -> None:
    """Starts this process again, under the same id, with the settings. To be called before anything is imported."""
    new = environment(os.environ)
    if new is not None and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], new)


def keep_memory() -> None:
    """From the next compiled program on, memory that a step gives back stays with the process, if it runs on a CPU and
    was started with the settings (`use`)."""
    if _set(os.environ.get("GLIBC_TUNABLES", "")):
        import jax

        jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, seconds: float, **_) -> None:
    import jax

    if event not in (_BEFORE, _AFTER) or jax.default_backend() != "cpu":
        return
    glibc = ctypes.CDLL(None)
    if event == _BEFORE:  # what compiling takes is given back piece by piece
        glibc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        return
    glibc.malloc_trim(0)
    resident, available = _memory()
    if available < _ROOM * resident:
        return
    glibc.mallopt(_M_MMAP_MAX, 0)
    glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    if seconds > 1:
        glibc.malloc.restype, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        pool, _stays = glibc.malloc(_POOL), glibc.malloc(4096)
        glibc.free(pool)


def _memory() -> tuple[int, int]:
    """Bytes that this process has in memory, and that are free for it."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return resident, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _set(tunables: str) -> bool:
    return all(name in tunables for name in _TUNABLES)


def _glibc_can() -> bool:
    """The first of them came with glibc 2.35; other C libraries have none."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
    except (AttributeError, ValueError, OSError):
        return False
